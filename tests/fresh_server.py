"""Does each job that comes in in a copy of this process, which has imported transformers.

It imports nothing of graphprune: those who open a checkpoint won't either.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback


def serve() -> None:
    """Read jobs and write answers, a line of JSON each."""
    for line in sys.stdin:
        job = json.loads(line)
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(readable)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream in (1, 2):
                os.dup2(writable, stream)
            os._exit(_done(job["arguments"], job["environment"]))
        os.close(writable)
        with open(readable, errors="replace") as reader:
            errors = reader.read()
        _, status = os.waitpid(child, 0)
        answer = {"status": os.waitstatus_to_exitcode(status), "errors": errors}
        print(json.dumps(answer), flush=True)


def _done(arguments: list[str], environment: dict[str, str]) -> int:
    """Run a script or code; its exit status."""
    os.environ.clear()
    os.environ.update(environment)
    for name, module in list(sys.modules.items()):  # they have read it while they were imported
        if name.startswith("transformers.") and "HF_MODULES_CACHE" in vars(module):
            vars(module)["HF_MODULES_CACHE"] = environment["HF_MODULES_CACHE"]
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:  # as an interpreter ends
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    import transformers.dynamic_module_utils
    import transformers.generation
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto  # noqa: F401

    serve()
