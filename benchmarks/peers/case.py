"""What is evaluated: a network with its weights, its inputs and its exact output, on files that every process reads."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np

from .others import OTHERS

NETWORKS = ("imagenet64", "lsun256", "digits", *OTHERS)
SEED = 0


class UnavailableError(Exception):
    """A peer that cannot be measured here, and why."""


def evaluated(network, *inputs, within=contextlib.nullcontext):
    """The function that is timed of a network in torch: it evaluates the inputs, and returns the output as an array.

    On a GPU the array is there once the network is done, so that nothing has to wait for it besides. `within` makes the
    context of the evaluation.
    """
    import torch

    def call():
        with torch.inference_mode(), within():
            return network(*inputs).float().cpu().numpy()

    return call


@dataclasses.dataclass(frozen=True)
class Case:
    """One network at one batch size, precision and number of threads, with `files` for everything that is kept."""

    network: str
    batch: int
    dtype: str  # "fp32" or "bf16"
    threads: int
    files: Path
    device: str = "cpu"  # or "cuda"

    def to_json(self):
        return json.dumps({**dataclasses.asdict(self), "files": str(self.files)})

    @classmethod
    def from_json(cls, text):
        fields = json.loads(text)
        return cls(**{**fields, "files": Path(fields["files"])})

    @property
    def weights(self):
        return self.files / f"{self.network}.pt"

    @property
    def folder(self):
        return self.files / f"{self.network}-batch{self.batch}"

    def inputs(self, times="timesteps"):
        """The arrays x [N, C, H, W], timesteps [N] and, for a conditional network, class_labels [N].

        times "embedding" gives the timesteps' sinusoids [N, model_channels] in their place (see `plain.FromEmbedding`).
        Another project's network has its own inputs, whatever `times`.
        """
        names = OTHERS[self.network].inputs if self.network in OTHERS else ("x", times, "class_labels")
        paths = [self.folder / f"{name}.npy" for name in names]
        return [np.load(path) for path in paths if path.exists()]

    def reference(self):
        """The output of the definition in float64."""
        return np.load(self.folder / "reference.npy")

    def torch_dtype(self):
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    def unet(self):
        """The network in float32."""
        import torch

        import cmfast

        if self.network in OTHERS:
            unet = OTHERS[self.network].network()
        else:
            config = _bundled().config if self.network == "digits" else getattr(cmfast.UNetConfig, self.network)()
            with torch.device("meta"):
                unet = cmfast.UNet(config)
        unet.load_state_dict(torch.load(self.weights, weights_only=True), assign=True)
        return unet.eval().requires_grad_(False)

    def torch_inputs(self, times="timesteps"):
        """The inputs as tensors on the device, in the dtype of the network but for numbers and times."""
        import torch

        x, *conditions = (torch.from_numpy(array).to(self.device) for array in self.inputs(times))
        if self.network in OTHERS:
            conditions = [t.to(self.torch_dtype()) if t.is_floating_point() else t for t in conditions]
        return x.to(self.torch_dtype()), *conditions

    def exportable(self):
        """The network as other projects convert it, with `inputs("embedding")`."""
        from cmfast.benchmarking.plain_network import FromEmbedding

        return self.unet() if self.network in OTHERS else FromEmbedding(self.unet())

    def write(self):
        """Write the weights, the inputs and the reference where they are missing."""
        if not self.weights.exists():
            _write_weights(self.network, self.weights)
        if not (self.folder / "complete").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_inputs(self)
            (self.folder / "complete").touch()


def _bundled():
    import cmfast

    return cmfast.load("digits").unet


def _write_weights(network, path):
    """Those of the bundled model, or for the released sizes the formula weights that the tests' fixtures have too.

    Normal numbers z, drawn tensor by tensor in the order of the sorted keys: matrices and kernels are z divided by the
    square root of their number of inputs, norms' weights 1 + 0.2 z, biases 0.1 z.
    """
    import torch

    import cmfast
    from cmfast.files import whole_file

    if network == "digits":
        state = _bundled().state_dict()
    else:
        if network in OTHERS:
            state = OTHERS[network].network().state_dict()
        else:
            with torch.device("meta"):
                state = cmfast.UNet(getattr(cmfast.UNetConfig, network)()).state_dict()
        random = np.random.RandomState(SEED)
        for key in sorted(state):
            z = random.standard_normal(tuple(state[key].shape))
            if z.ndim > 1:
                z = z / np.sqrt(z[0].size)
            elif key.endswith("weight"):
                z = 1 + 0.2 * z
            else:
                z = 0.1 * z
            state[key] = torch.from_numpy(z.astype(np.float32))
    with whole_file(path) as file:
        torch.save(state, file)


def _write_inputs(case):
    import torch

    from cmfast import kernels
    from cmfast.unet import timestep_embedding

    random = np.random.RandomState(SEED)
    unet = case.unet()
    if case.network in OTHERS:
        arrays = OTHERS[case.network].arrays(case.batch, random)
        arrays["reference"] = _exact(unet, list(arrays.values()))
        for name, array in arrays.items():
            np.save(case.folder / f"{name}.npy", array)
        return
    config = unet.config
    x = random.standard_normal((case.batch, *config.sample_shape)).astype(np.float32)
    timesteps = random.uniform(-1500, 1000, case.batch).astype(np.float32)  # 250 ln σ
    labels = [] if config.num_classes is None else [random.randint(config.num_classes, size=case.batch)]
    with kernels.use_backend("reference"):
        embedding = timestep_embedding(torch.from_numpy(timesteps), config.model_channels)
        exact = _exact(unet, [x, timesteps, *labels])
    arrays = {"x": x, "timesteps": timesteps, "embedding": embedding.numpy(), "reference": exact}
    for name, array in {**arrays, **({"class_labels": labels[0]} if labels else {})}.items():
        np.save(case.folder / f"{name}.npy", array)


def _exact(network, arrays):
    """The output in float64, of one sample at a time: eight of 256 x 256 pixels take more than 24 GB at once."""
    import torch

    network.double()
    wide = [torch.from_numpy(a.astype(np.float64) if a.dtype == np.float32 else a) for a in arrays]
    samples = zip(*(a.split(1) for a in wide), strict=True)
    with torch.inference_mode():
        return torch.cat([network(*sample) for sample in samples]).numpy()
