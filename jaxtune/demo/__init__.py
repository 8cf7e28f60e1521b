"""The main job on embedded data: bases drawn from fonts, a fine-tune on real handwritten digits."""
