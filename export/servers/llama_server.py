"""llama.cpp's own HTTP server, from the package xllamacpp: a script for whichever Python has that package.

    python llama_server.py MODEL PORT CONTEXT SLOTS NAME TEMPLATE

TEMPLATE is a JSON object with the chat template's arguments. SIGTERM ends it.
"""

import json
import signal
import sys
from pathlib import Path


def main(model: str, port: int, context: int, slots: int, name: str, template: dict[str, bool]) -> None:
    """Serve `slots` requests at a time, each with `context` tokens; returns on SIGTERM."""
    import xllamacpp

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])  # for every thread of the server
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {name}
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_ctx, params.n_parallel = context * slots, slots  # n_ctx is shared out among the slots
    params.default_template_kwargs = {key: json.dumps(value) for key, value in template.items()}
    params.ui = False
    server = xllamacpp.Server(params)
    print(f"serving {model} at {server.listening_address}", flush=True)  # noqa: T201
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    here = str(Path(__file__).parent)  # vllm.py, triton.py and others, which must not be taken for packages
    sys.path[:] = [folder for folder in sys.path if folder != here]
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], json.loads(sys.argv[6]))
