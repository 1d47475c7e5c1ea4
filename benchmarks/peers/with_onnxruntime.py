"""ONNX Runtime: the ONNX file that torch.onnx writes, with all optimisations of graphs."""

PACKAGES = ("onnxruntime", "onnx", "onnxscript")
REFUSED = {"bf16": "its CPU provider has no convolution in bfloat16"}


def export(case, folder):
    import torch

    inputs = tuple(torch.from_numpy(array) for array in case.inputs("embedding"))
    with torch.no_grad():
        torch.onnx.export(case.exportable(), inputs, folder / "network.onnx", dynamo=True, external_data=True)


def prepare(case, folder):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = case.threads
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # By default its threads spin for a second after a call, into the next peer's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(folder / "network.onnx", options, providers=["CPUExecutionProvider"])
    inputs = dict(zip((i.name for i in session.get_inputs()), case.inputs("embedding"), strict=True))

    def call():
        return session.run(None, inputs)[0]

    return call
