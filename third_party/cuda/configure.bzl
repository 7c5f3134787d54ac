"""CUDA's compiler, headers and static runtime, where they are installed, as the repository @cuda.

`@cuda//:cuda.bzl` has NVCC, the compiler's path or None, and GENCODE, its flags of the architectures.
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "headers",
    hdrs = glob(["include/**"]),
    includes = ["include"],
)

cc_library(
    name = "runtime",
    srcs = ["libcudart_static.a"],
    linkopts = ["-ldl", "-lpthread", "-lrt"],
    deps = [":headers"],
)
"""

def _gencode(architectures):
    flags = ["-gencode=arch=compute_%s,code=sm_%s" % (name, name) for name in architectures]

    # PTX of the least one, for chips that none of them runs on.
    least = architectures[0]
    return flags + ["-gencode=arch=compute_%s,code=compute_%s" % (least, least)]

def _cuda_configure(context):
    folder = context.os.environ.get("STF_CUDA", "")
    context.file("BUILD", _BUILD if folder else "")
    architectures = context.os.environ.get("STF_CUDA_ARCHITECTURES", "").split(",")
    context.file("cuda.bzl", "\n".join([
        "NVCC = %r" % (folder + "/bin/nvcc" if folder else None),
        "GENCODE = %r" % (" ".join(_gencode(architectures)) if folder else ""),
    ]) + "\n")
    if folder:
        context.symlink(folder + "/include", "include")
        context.symlink(folder + "/lib64/libcudart_static.a", "libcudart_static.a")

cuda_configure = repository_rule(
    implementation = _cuda_configure,
    doc = "Makes @cuda of the toolkit whose folder the environment names; empty where it names none.",
    environ = ["STF_CUDA", "STF_CUDA_ARCHITECTURES"],
    local = True,
)
