"""TensorFlow's headers and libraries, from an installed wheel, as the repository @tensorflow."""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "tensorflow",
    srcs = [
        "lib/libtensorflow_framework.so.2",
        "lib/libtensorflow_cc.so.2",
    ],
    hdrs = glob(["include/**"]),
    defines = [{defines}],
    includes = [
        "include",
        "include/external/farmhash_archive/src",
        "include/external/highwayhash",
    ],
)
"""

def _tensorflow_configure(context):
    include = context.os.environ.get("STF_TENSORFLOW_INCLUDE")
    lib = context.os.environ.get("STF_TENSORFLOW_LIB")
    if not include or not lib:
        fail("Build through `make lib` or `python custom_ops/build.py`: they tell Bazel where TensorFlow is " +
             "(STF_TENSORFLOW_INCLUDE, STF_TENSORFLOW_LIB).")
    defines = context.os.environ.get("STF_TENSORFLOW_DEFINES", "").split(" ")
    context.symlink(include, "include")
    context.symlink(lib, "lib")
    context.file("BUILD", _BUILD.format(defines = ", ".join(['"%s"' % define for define in defines if define])))

tensorflow_configure = repository_rule(
    implementation = _tensorflow_configure,
    doc = "Makes @tensorflow of the wheel whose folders the environment names.",
    environ = ["STF_TENSORFLOW_INCLUDE", "STF_TENSORFLOW_LIB", "STF_TENSORFLOW_DEFINES"],
    local = True,
)
