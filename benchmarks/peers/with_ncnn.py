"""ncnn: pnnx's conversion of the traced network. ncnn has no batches: samples are evaluated one after another."""

import subprocess

import numpy as np

PACKAGES = ("ncnn", "pnnx")


def export(case, folder):
    import pnnx
    import torch

    inputs = tuple(torch.from_numpy(array[:1]) for array in case.inputs("embedding"))
    with torch.no_grad():
        torch.jit.trace(case.exportable(), inputs, check_trace=False).save(folder / "network.pt")
    shapes = ",".join(f"{list(t.shape)}{'i64' if t.dtype == torch.int64 else ''}".replace(" ", "") for t in inputs)
    command = [pnnx.EXEC_PATH, "network.pt", f"inputshape={shapes}", "fp16=0"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def prepare(case, folder):
    import ncnn

    net = ncnn.Net()
    options = net.opt
    options.num_threads = case.threads
    options.use_winograd_convolution = options.use_sgemm_convolution = options.use_packing_layout = True
    options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
    options.use_bf16_storage = case.dtype == "bf16"
    net.load_param(str(folder / "network.ncnn.param"))
    net.load_model(str(folder / "network.ncnn.bin"))
    arrays = [a.astype(np.int32) if a.dtype == np.int64 else a for a in case.inputs("embedding")]

    def sample(i):
        extractor = net.create_extractor()
        for name, array in zip(net.input_names(), arrays, strict=True):
            extractor.input(name, ncnn.Mat(array[i] if array.ndim > 1 else array[i : i + 1]))
        return np.array(extractor.extract(net.output_names()[0])[1])

    def call():
        return np.stack([sample(i) for i in range(case.batch)])

    return call
