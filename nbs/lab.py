"JupyterLab as `make lab` starts it: `jupyter lab --config=nbs/lab.py` in the root of the repository."

from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelspec import get_kernel_dict, KERNEL_NAME
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

KERNEL = {"name": KERNEL_NAME} | {key: get_kernel_dict()[key] for key in ("display_name", "language")}


class Notebooks(AsyncLargeFileManager):
    """Gives a notebook with what JupyterLab would add as soon as its kernel runs: names and versions of this machine.

    Saved notebooks do not hold them. Without them a notebook would count as changed when it is merely opened."""

    async def get(self, path, content=True, *arguments, **options):
        model = await super().get(path, content, *arguments, **options)
        if content and model["type"] == "notebook":
            model["content"]["metadata"] |= {"kernelspec": KERNEL, "language_info": IPythonKernel.language_info}
        return model


c = get_config()  # noqa: F821  (Jupyter gives it to its configuration files)
c.ServerApp.root_dir = "."
c.ServerApp.contents_manager_class = Notebooks
c.ServerApp.tornado_settings = {"websocket_max_message_size": 1_000_000_000}  # widgets send pictures through it
c.LabApp.default_url = "/lab/tree/nbs/upscale.ipynb"
