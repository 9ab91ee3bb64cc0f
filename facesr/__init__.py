__version__ = "0.1.0"


def main() -> None:
    "The command `facesr`. What it imports takes seconds, in which Ctrl-C and whatever is broken end in a sentence, too."
    import os
    import sys

    # Threads of a GNU build of PyTorch spin while they wait. A short spin is as fast alone, and faster beside other work.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from facesr.cli import main as command
    except KeyboardInterrupt:
        print("interrupted, before anything was done", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("FACESR_DEBUG"):
            raise
        print(f"error: facesr cannot start ({type(error).__name__}: {error}); install it again", file=sys.stderr)
        raise SystemExit(1) from None
    command()


def __getattr__(name: str):
    "Upscaler and Photograph, imported when they are asked for: `import facesr` alone costs nothing."
    if name == "Upscaler":
        from facesr.upscale import Upscaler

        return Upscaler
    if name == "Photograph":
        from facesr.photograph import Photograph

        return Photograph
    raise AttributeError(f"module 'facesr' has no attribute {name!r}")
