"""Every merge method by name."""

from jaxtune.merge.linear import LINEAR
from jaxtune.merge.method import Method
from jaxtune.merge.slerp import SLERP
from jaxtune.merge.task_arithmetic import TASK_ARITHMETIC

METHODS: dict[str, Method] = {
    "linear": LINEAR,
    "slerp": SLERP,
    "task_arithmetic": TASK_ARITHMETIC,
}
