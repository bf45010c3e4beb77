"Triton's interpreter, faster: it looks through all of triton.language at every call of a function, half of its time."
import inspect


def look_once():
    "What never changes is looked up once: names of what is built in, languages of a function, dtypes of numpy"
    from triton.runtime import interpreter
    _patch_names(interpreter)
    _patch_once(interpreter)
    _patch_dtypes(interpreter)


def _patch_names(interpreter):
    known, is_builtin = {}, interpreter.tl.core.is_builtin

    def patch_builtin(pkg, builder, scope):
        if pkg not in known: known[pkg] = [n for n, m in inspect.getmembers(pkg) if is_builtin(m)]
        for n in known[pkg]:
            if is_builtin(m := getattr(pkg, n)): interpreter._patch_attr(pkg, n, m, builder, scope)
    interpreter._patch_builtin = patch_builtin


def _patch_once(interpreter):
    "A function that a kernel calls finds the language patched: it stays so until the kernel ends"
    tl, patch = interpreter.tl, interpreter._patch_lang
    languages, patched = {}, set()

    class Scope:
        def __init__(self, inner): self.inner = inner

        def restore(self):
            patched.clear()
            self.inner.restore()

    def patch_lang(fn):
        if fn not in languages:
            languages[fn] = {v for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)}
        if patched and languages[fn] <= patched: return interpreter._LangPatchScope()
        scope = Scope(patch(fn))
        patched.update(languages[fn])
        return scope
    interpreter._patch_lang = patch_lang


def _patch_dtypes(interpreter):
    known, of = {}, interpreter._get_np_dtype

    def dtype(t):
        scalar = t.scalar
        if isinstance(scalar, interpreter.tl.pointer_type): return of(scalar)
        if scalar not in known: known[scalar] = of(scalar)
        return known[scalar]
    interpreter._get_np_dtype = dtype
