"""Triton's interpreter without what it does again and again."""

import functools


def patch_once_a_launch():
    """Let the interpreter replace the functions of triton.language at a launch, and not at each call within as well.

    A call of a function of a kernel looks through the language and replaces what the launch has replaced already: half
    of the time that tests of kernels would take. A version of triton that does this otherwise is left as it is.
    """
    try:
        from triton.runtime import interpreter

        executor, patch = interpreter.GridExecutor, interpreter._patch_lang
        nothing_to_restore = interpreter._LangPatchScope
    except (ImportError, AttributeError):
        return
    launch = executor.__call__
    patched = None  # the modules whose functions have seen it in this launch; None outside of one

    def patch_lang(fn):
        if patched is None or fn.__module__ not in patched:
            if patched is not None:
                patched.add(fn.__module__)
            return patch(fn)
        return nothing_to_restore()

    @functools.wraps(launch)
    def call(self, *args, **kwargs):
        nonlocal patched
        patched = set()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched = None

    interpreter._patch_lang = patch_lang
    executor.__call__ = call
