"""The error of lora/ for mistakes that the user can correct."""


class LoraError(ValueError):
    """Bad input; the message is one line with the mistake and the cure."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))
