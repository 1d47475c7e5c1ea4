"""OpenVINO: its own conversion of the PyTorch network, compiled for latency."""

PACKAGES = ("openvino",)


def export(case, folder):
    import openvino
    import torch

    x, *conditions = (torch.from_numpy(array) for array in case.inputs("embedding"))
    with torch.no_grad():
        model = openvino.convert_model(case.exportable(), example_input=(x, *conditions))
    model.reshape({model.inputs[i]: list(array.shape) for i, array in enumerate(case.inputs("embedding"))})
    openvino.save_model(model, folder / "network.xml", compress_to_fp16=False)


def prepare(case, folder):
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": case.threads,
        # Where the processor has bf16 it is the default.
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[case.dtype],
        # The attention of these networks crashes with its code generator (2025.2 to 2026.4).
        "SNIPPETS_MODE": "DISABLE",
        "CACHE_DIR": str(folder / "compiled"),
    }
    request = openvino.Core().compile_model(folder / "network.xml", "CPU", settings).create_infer_request()
    inputs = case.inputs("embedding")

    def call():
        return request.infer(inputs, share_inputs=True)[0]

    return call
