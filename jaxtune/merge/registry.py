"""Every merge method by name."""

from jaxtune.merge.bitdelta import BITDELTA
from jaxtune.merge.emr import EMR
from jaxtune.merge.graft import GRAFT
from jaxtune.merge.half_reset import HALF_RESET
from jaxtune.merge.linear import LINEAR
from jaxtune.merge.magmax import MAGMAX
from jaxtune.merge.metagpt import METAGPT
from jaxtune.merge.method import Method
from jaxtune.merge.pcb import PCB
from jaxtune.merge.slerp import SLERP
from jaxtune.merge.tall import CONSENSUS, TALL
from jaxtune.merge.task_arithmetic import TASK_ARITHMETIC

METHODS: dict[str, Method] = {
    "linear": LINEAR,
    "slerp": SLERP,
    "task_arithmetic": TASK_ARITHMETIC,
    "bitdelta": BITDELTA,
    "emr": EMR,
    "graft": GRAFT,
    "half_reset": HALF_RESET,
    "magmax": MAGMAX,
    "metagpt": METAGPT,
    "pcb": PCB,
    "consensus": CONSENSUS,
    "tall": TALL,
}
