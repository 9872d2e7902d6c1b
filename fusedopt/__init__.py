"""Drop-in ``torch.optim`` optimizers whose step is one native call."""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .grad_norm import clip_grad_norm_
from .rmsprop import RMSprop
from .sgd import SGD

__version__ = "0.1.0"
__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop", "clip_grad_norm_"]
