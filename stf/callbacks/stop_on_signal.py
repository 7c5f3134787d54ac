"""The end of a run that is told to end."""

import signal
import threading

import keras

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(keras.callbacks.Callback):
    """Ends training after the step in hand when SIGTERM or Ctrl-C comes; a second one ends it at once.

    The epoch is ended too, so that checkpoints and logs are written as at every epoch's end; a validation is cut short.

    Attributes:
        received: the `signal.Signals` that came, or None.
    """

    def __init__(self):
        super().__init__()
        self.received = None
        self._handlers = {}

    def on_train_begin(self, logs=None):
        """Takes the signals, in the main thread, which alone may."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_end(self, logs=None):
        """Gives the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(self, batch, logs=None):
        """Stops the epoch."""
        if self.received:
            self.model.stop_training = True

    def on_test_batch_end(self, batch, logs=None):
        """Stops a validation."""
        if self.received:
            self.model.stop_evaluating = True

    def on_epoch_end(self, epoch, logs=None):
        """Stops training."""
        if self.received:
            self.model.stop_training = True

    def _note(self, number, frame):
        if self.received:  # whoever asks twice does not want to wait
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: stopping after this step", flush=True)
