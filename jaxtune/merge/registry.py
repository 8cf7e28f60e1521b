"""Every merge method by name."""

from jaxtune.merge.arcee_fusion import ARCEE_FUSION
from jaxtune.merge.bitdelta import BITDELTA
from jaxtune.merge.boosting import BOOSTED, CALIBRATION
from jaxtune.merge.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from jaxtune.merge.covariance import ACE, WUDI
from jaxtune.merge.dare import DARE_LINEAR, DARE_TIES
from jaxtune.merge.della import DELLA, DELLA_LINEAR
from jaxtune.merge.emr import EMR
from jaxtune.merge.fisher import FISHER
from jaxtune.merge.geometric_median import GEOMETRIC_MEDIAN
from jaxtune.merge.graft import GRAFT
from jaxtune.merge.half_reset import HALF_RESET
from jaxtune.merge.isotropic import ISO_C, ISO_CTS
from jaxtune.merge.karcher import KARCHER
from jaxtune.merge.linear import LINEAR
from jaxtune.merge.magmax import MAGMAX
from jaxtune.merge.metagpt import METAGPT
from jaxtune.merge.method import Method
from jaxtune.merge.model_stock import MODEL_STOCK
from jaxtune.merge.multislerp import MULTISLERP
from jaxtune.merge.nearswap import NEARSWAP
from jaxtune.merge.nuslerp import NUSLERP
from jaxtune.merge.passthrough import PASSTHROUGH
from jaxtune.merge.pcb import PCB
from jaxtune.merge.ram import RAM, RAMPLUS_TL
from jaxtune.merge.regmean import REGMEAN
from jaxtune.merge.sce import SCE
from jaxtune.merge.slerp import SLERP
from jaxtune.merge.subspaces import CORE_SPACE, KNOTS
from jaxtune.merge.tall import CONSENSUS, TALL
from jaxtune.merge.task_arithmetic import TASK_ARITHMETIC
from jaxtune.merge.ties import TIES
from jaxtune.merge.trajectory import EMA, TRAJECTORY
from jaxtune.merge.truncated import CART, STAR
from jaxtune.merge.tsv import TSV_M
from jaxtune.merge.wise_ft import WISE_FT

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
    "nuslerp": NUSLERP,
    "multislerp": MULTISLERP,
    "karcher": KARCHER,
    "geometric_median": GEOMETRIC_MEDIAN,
    "model_stock": MODEL_STOCK,
    "nearswap": NEARSWAP,
    "passthrough": PASSTHROUGH,
    "arcee_fusion": ARCEE_FUSION,
    "ties": TIES,
    "dare_linear": DARE_LINEAR,
    "dare_ties": DARE_TIES,
    "breadcrumbs": BREADCRUMBS,
    "breadcrumbs_ties": BREADCRUMBS_TIES,
    "della": DELLA,
    "della_linear": DELLA_LINEAR,
    "sce": SCE,
    "ram": RAM,
    "ramplus_tl": RAMPLUS_TL,
    "ema": EMA,
    "trajectory": TRAJECTORY,
    "wise_ft": WISE_FT,
    "tsv_m": TSV_M,
    "iso_c": ISO_C,
    "iso_cts": ISO_CTS,
    "knots": KNOTS,
    "core_space": CORE_SPACE,
    "star": STAR,
    "cart": CART,
    "calibration": CALIBRATION,
    "subspace_boosting": BOOSTED,
    "wudi": WUDI,
    "ace": ACE,
    "fisher": FISHER,
    "regmean": REGMEAN,
}
