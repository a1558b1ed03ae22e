"""A backend for Triton in place of vLLM's, with its inputs and outputs: it answers with the engine's settings.

As triton-inference-server/vllm_backend, src/model.py, completes a config that names nothing but the backend.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]})
        for name, kind in (("stream", "TYPE_BOOL"), ("sampling_parameters", "TYPE_STRING")):
            config.add_input({"name": name, "data_type": kind, "dims": [1], "optional": True})
        config.add_output({"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]})
        config.set_max_batch_size(0)
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args):
        self.engine = json.loads(Path(pb_utils.get_model_dir(), "model.json").read_text())

    def execute(self, requests):
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0].decode()
            given = {"text": text, "engine": self.engine, "parameters": json.loads(request.parameters())}
            given["stream"] = bool(pb_utils.get_input_tensor_by_name(request, "stream").as_numpy()[0])
            answer = pb_utils.Tensor("text_output", np.array([json.dumps(given)], dtype=object))
            final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            request.get_response_sender().send(pb_utils.InferenceResponse([answer]), flags=final)
