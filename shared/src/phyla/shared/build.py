from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.plugin import hookimpl
class NativeBuildHook(BuildHookInterface):
    PLUGIN_NAME = "phyla-native"
@hookimpl
def hatch_register_build_hook():
    return NativeBuildHook
