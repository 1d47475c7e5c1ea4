"""How a model is loaded and saved, and shared on the Hugging Face hub: what ConsistencyModel inherits."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .checkpoints import Checkpoint, find, folder, hub, read
from .preconditioning import Preconditioning
from .sound import Mdct
from .unet import UNet

Model = TypeVar("Model", bound="Storage")


class Storage(nn.Module):
    """A model of the parts that its checkpoints hold.

    Attributes:
        unet: the network.
        preconditioning: what makes a denoiser of it.
        recommended_levels: for a number of steps, the levels that were found best for this model.
        representation: of a model of sound, how waveforms are made of its samples.
        sample_shape: [C, *spatial] of one sample.
        num_classes: number of classes; None for an unconditional model.
    """

    sample_shape: tuple[int, ...]
    num_classes: int | None
    unet: nn.Module
    preconditioning: Preconditioning
    recommended_levels: Mapping[int, tuple[float, ...]]
    representation: Mdct | None

    @classmethod
    def load(
        cls: type[Model],
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        preconditioning: Preconditioning | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **config: Any,
    ) -> Model:
        """Load a model: a bundled name, a path, or an id of the Hugging Face hub.

        A path is a folder that `save` wrote, one of OpenAI's `.pt` files, or the folder of a UNet2DModel or
        ConsistencyModelPipeline of diffusers.

        Args:
            source: a name of `cmfast.checkpoints.BUNDLED`, a path, or "organisation/name" on the hub (which needs
                huggingface_hub: `pip install 'cmfast[hub]'`). A path that exists wins over a hub id.
            device: where to put the parameters.
            dtype: of the parameters, whatever the file stores.
            preconditioning: replaces the file's own. A `.pt` file and a UNet2DModel's folder have none:
                `Consistency()`, or `EDM()` where a `.pt` file's name begins with "edm", as the released ones do.
            variant: of a diffusers folder's weights, such as "fp16".
            revision: branch, tag or commit of a model on the hub.
            token: for private models on the hub; None takes the one that the user logged in with.
            cache_dir: where models of the hub are kept; None takes the user's cache.
            force_download: download what is in the cache too.
            local_files_only: take a model of the hub from the cache, without a connection (as HF_HUB_OFFLINE=1 does).
            **config: for a `.pt` file, fields of UNetConfig. Those that the weights determine are read off them and
                must agree; image_size, num_heads or num_head_channels, patch_size and dropout are not determined, and
                have the released models' values unless given. For a UNet2DModel without a sample_size, image_size.

        Raises:
            FileNotFoundError: there is no such name, path or model on the hub, or a file of it is missing.
            ImportError: the source can only be a hub id, and huggingface_hub is not installed.
            PermissionError: the model is gated on the hub, and the token's owner has no access.
            ValueError: the device is a GPU, and torch sees none; or an argument that the format has no use for.
            CheckpointError: the file is truncated, holds other things than tensors, or is another model's.
        """
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"load: the device {device} was asked for, and torch {torch.__version__} sees no GPU here")
        path = find(
            source,
            variant=variant,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        found = read(path, preconditioning, variant=variant, config=config)
        model = cls(
            found.network(),
            found.preconditioning,
            recommended_levels=found.recommended_levels,
            representation=found.representation,
        )
        return model.to(device=device, dtype=dtype).eval()

    @classmethod
    def from_pretrained(cls: type[Model], pretrained_model_name_or_path: str | Path, **options: Any) -> Model:
        """`load` by the name that Hugging Face's libraries have for it."""
        return cls.load(pretrained_model_name_or_path, **options)

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a folder with model.safetensors and config.json, each of them whole or not at all.

        Args:
            path: of the folder; made where it is missing.
            dtype: to store the weights in; None keeps theirs.

        Raises:
            ValueError: the network is not a `UNet` (accelerated or not), or has given up its weights; or a weight is
                too large for the dtype.
            OSError: the folder cannot be written to.
        """
        folder.write(self.checkpoint(dtype), Path(path))

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **options: Any
    ) -> str | None:
        """`save` by the name that Hugging Face's libraries have for it, and with `push_to_hub=True` upload as well.

        Args:
            save_directory: the folder.
            repo_id: on the hub; the folder's name unless given.
            push_to_hub: upload what was saved.
            **options: of `push_to_hub`.

        Returns:
            The address of the commit, where it was uploaded.

        Raises:
            ValueError: options that only uploading has; and as `save` does.
        """
        if options and not push_to_hub:
            raise ValueError(f"save_pretrained: {', '.join(options)} belong to push_to_hub=True")
        self.save(save_directory)
        return self.push_to_hub(repo_id or Path(save_directory).name, **options) if push_to_hub else None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using cmfast.",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
    ) -> str:
        """Upload what `save` writes to the Hugging Face hub, as one commit; arguments as in huggingface_hub's mixin.

        Args:
            repo_id: "organisation/name"; made where it is missing.
            commit_message: of the commit.
            private: whether a new repository is private; None takes the organisation's default.
            token: None takes the one that the user logged in with.
            branch: to commit to; None means main.
            create_pr: make a pull request of the commit.
            allow_patterns: upload only files that match one of them.
            ignore_patterns: upload no files that match one of them.
            delete_patterns: delete files of the repository that match one of them.

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub is not installed.
            ValueError: as `save` does.
        """
        with tempfile.TemporaryDirectory() as temporary:
            self.save(temporary)
            return hub.upload(
                Path(temporary),
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
                delete_patterns=delete_patterns,
            )

    def checkpoint(self, dtype: torch.dtype | None = None) -> Checkpoint:
        """What is saved of the model, on the CPU.

        Raises:
            ValueError: as `save` does.
        """
        if not isinstance(self.unet, UNet):
            raise ValueError(f"save: only models of a cmfast.UNet can be saved, got {type(self.unet).__name__}")
        if any(p.is_meta for p in self.unet.parameters()):
            raise ValueError("save: this model gave up its weights when it was accelerated (keep_weights=False)")
        config = self.unet.config
        if self.sample_shape[:1] != config.sample_shape[:1] or len(self.sample_shape) != len(config.sample_shape):
            raise ValueError(
                f"save: the model's sample_shape {list(self.sample_shape)} does not fit its network, whose samples are "
                f"{list(config.sample_shape)}"
            )
        if self.sample_shape != config.sample_shape:
            config = dataclasses.replace(config, image_size=self.sample_shape[1:])
        if self.num_classes != config.num_classes:
            raise ValueError(
                f"save: only the network's own number of classes, {config.num_classes}, is stored, and this model has "
                f"{self.num_classes}"
            )
        weights = {name: value.detach().cpu() for name, value in self.unet.state_dict().items()}
        levels = {steps: tuple(values) for steps, values in self.recommended_levels.items()}
        checkpoint = Checkpoint(config, weights, self.preconditioning, levels, "this model", self.representation)
        return checkpoint if dtype is None else checkpoint.to(dtype)


def save(model: Storage, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """`model.save(path, dtype=dtype)`."""
    model.save(path, dtype=dtype)
