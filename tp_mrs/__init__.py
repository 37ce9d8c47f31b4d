"""Module Robustness Sensitivity for Torch-Pruning: smaller networks that still withstand adversarial attacks."""

from ._version import __version__
from .allocation import allocate
from .architectures import refresh
from .card import save
from .compensation import compensated_step
from .coupling import CouplingReport, check_coupling
from .errors import DivergenceError, InputError
from .evaluation import Evaluation, evaluate
from .exporting import export
from .finetuning import Finetuning, finetune
from .importance import MRSImportance
from .measuring import measure_sensitivity
from .models import create_model, normalize
from .pipeline import Report, mrpf
from .pruning import pruner_kwargs
from .recalibration import recalibrate
from .sensitivity import Sensitivity
from .storage import load

__all__ = [
    "CouplingReport",
    "DivergenceError",
    "Evaluation",
    "Finetuning",
    "InputError",
    "MRSImportance",
    "Report",
    "Sensitivity",
    "__version__",
    "allocate",
    "check_coupling",
    "compensated_step",
    "create_model",
    "evaluate",
    "export",
    "finetune",
    "load",
    "measure_sensitivity",
    "mrpf",
    "normalize",
    "pruner_kwargs",
    "recalibrate",
    "refresh",
    "save",
]
