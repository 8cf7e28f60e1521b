"""Families of networks as pure functions over nested dicts; `registry` is their one door."""
