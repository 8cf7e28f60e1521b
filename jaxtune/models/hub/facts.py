"""What the tensors of a checkpoint tell of its network and config.json does not: an optional pooler, an untied head.

A family that needs it has a function `facts(values, names)`; what that returns stands under `FACTS` in the values that
its `read_config` is given. Without it a config is that of the class it names.
"""

FACTS = "jaxtune_facts"
