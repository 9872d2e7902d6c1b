"""Drop-in ``torch.optim`` optimizers whose step is one native call."""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .rmsprop import RMSprop
from .sgd import SGD

__version__ = "0.1.0"
__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]
