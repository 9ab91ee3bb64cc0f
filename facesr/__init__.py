__version__ = "0.1.0"


def __getattr__(name: str):
    "Upscaler, imported when it is asked for: `import facesr` alone costs nothing."
    if name == "Upscaler":
        from facesr.upscale import Upscaler

        return Upscaler
    raise AttributeError(f"module 'facesr' has no attribute {name!r}")
