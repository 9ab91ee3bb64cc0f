"The package, read from settings.ini: the one source of version, requirements and scripts."

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
EXTRAS = ("cluster", "onnx", "identity", "photographs")
extras = {extra: shlex.split(settings[f"{extra}_requirements"]) for extra in EXTRAS}
extras["dev"] = shlex.split(settings["dev_requirements"]) + sum(extras.values(), [])

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="AGPL-3.0-or-later",
    author=settings["author"],
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["facesr", "facesr.*"]),
    package_data={"facesr": ["assets/**/*"]},
    install_requires=shlex.split(settings["requirements"]),
    extras_require=extras,
    entry_points={"console_scripts": shlex.split(settings["console_scripts"])},
    zip_safe=False,
)
