"""Triton's interpreter without what it does again and again."""

import functools
import sys


def make_faster():
    """Let Triton's interpreter do once what it does again and again, and not look for overflows of integers.

    At every call of a function of a kernel the interpreter looks through triton.language for what the launch has
    replaced already; and coverage makes what it interprets take twice as long, at every launch for the same lines.
    Together they are three quarters of the time. Half of what is left goes into checks of integers, which overflow in
    none of the small tensors here. A version of triton that does otherwise is left as it is.
    """
    try:
        from triton.runtime import interpreter

        executor, patch_lang = interpreter.GridExecutor, interpreter._patch_lang
        nothing_to_restore = interpreter._LangPatchScope
        unchecked = interpreter.InterpreterOptions(sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return
    launch = executor.__call__
    patched = None  # in a launch, the modules for whose functions the language is patched
    measured = set()

    def patch_once(fn):
        if patched is None:
            return patch_lang(fn)
        if fn.__module__ in patched:
            return nothing_to_restore()
        patched.add(fn.__module__)
        return patch_lang(fn)

    @functools.wraps(launch)
    def launch_once_measured(self, *args, **kwargs):
        nonlocal patched
        # Which lines run depends on what is given, and on constants that are true or false; hardly on sizes.
        flags = {name: value for name, value in kwargs.items() if value is None or isinstance(value, bool)}
        form = (self.fn, tuple(x is None for x in args), tuple(sorted(flags.items())))
        tracer = sys.gettrace() if form in measured else None
        measured.add(form)
        patched = set()
        if type(tracer).__module__.startswith("coverage"):
            sys.settrace(None)
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched = None
            if sys.gettrace() is not tracer is not None:
                sys.settrace(tracer)
                _nothing()  # coverage takes over again at a call, so that it sees this function return

    interpreter.interpreter_builder.options = unchecked
    interpreter._patch_lang = patch_once
    executor.__call__ = launch_once_measured


def _nothing():
    pass
