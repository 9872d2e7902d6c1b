"""Drop-in ``torch.optim`` optimizers whose step is one native call."""

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .attached import attach, detach
from .clip import clip_grad_norm_
from .conversion import from_torch, patch, to_torch, unpatch
from .lion import Lion
from .nadam import NAdam
from .offloading import offload
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD
from .unloading import load_state, offload_state

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "attach",
    "clip_grad_norm_",
    "detach",
    "from_torch",
    "load_state",
    "offload",
    "offload_state",
    "patch",
    "to_torch",
    "unpatch",
]
