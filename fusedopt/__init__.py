"""Drop-in ``torch.optim`` optimizers whose step is one native call."""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .attached import attach, detach
from .conversion import from_torch, patch, to_torch, unpatch
from .grad_norm import clip_grad_norm_
from .rmsprop import RMSprop
from .sgd import SGD

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "RMSprop",
    "attach",
    "clip_grad_norm_",
    "detach",
    "from_torch",
    "patch",
    "to_torch",
    "unpatch",
]
