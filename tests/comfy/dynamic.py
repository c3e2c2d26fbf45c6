"""Dynamic VRAM without a GPU: a patcher that the pack and the core meet as the real one."""

from __future__ import annotations

import inspect

import comfy.model_patcher
import torch

ModelPatcher = comfy.model_patcher.ModelPatcher
KNOWN = "disable_dynamic" in inspect.signature(ModelPatcher.clone).parameters


class Uncopied:
    """Memory of the driver's."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle 'Uncopied' object")


class Dynamic(ModelPatcher):
    """Lends a layer its weights for as long as it runs; what backward finds of them afterwards is NaN. Leaves traces in
    the network. Has a plain clone only where `cached_patcher_init` tells how to load the file again.
    """

    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        pins = {"weights": (Uncopied(), [], [-1], [0]), "active": False, "current_prompt": False}
        model.dynamic_pins, model.dynamic_vbars = {load_device: pins}, {load_device: Uncopied()}

    def is_dynamic(self):
        return True

    def set_in_use_by_current_prompt(self, in_use):
        self.model.dynamic_pins[self.load_device]["current_prompt"] = in_use

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        assert not force_patch_weights
        self.unpatch_model(self.offload_device, unpatch_weights=False)
        self.patch_model(load_weights=False)
        self.load(device_to)

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, dirty=False):
        assert not full_load
        for name, module in self.model.named_modules():
            if not hasattr(module, "comfy_cast_weights"):
                continue
            module.comfy_cast_weights, module._pin_state = True, self.model.dynamic_pins[self.load_device]
            module._v_signature, module._pin_stack_index = Uncopied(), 0
            lent = []
            for kind in ("weight", "bias"):
                key = f"{name}.{kind}"
                patch = [comfy.model_patcher.LowVramPatch(key, self.patches)] if key in self.patches else []
                setattr(module, f"{kind}_function", [*patch, lambda w, lent=lent: lent.append(w.clone()) or lent[-1]])
            if not hasattr(module, "_pin_hook"):
                module._pin_hook = module.register_forward_hook(self.take_back)
            module._pins = lent
        self.model.device = device_to
        self.model.current_weight_patches_uuid = self.patches_uuid

    @staticmethod
    def take_back(module, inputs, output):
        for w in module._pins:
            w.data.fill_(torch.nan)  # autograd does not see it
        module._pins.clear()

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(None, unpatch_weights=False)
        if unpatch_weights:
            for module in self.model.modules():
                if hasattr(module, "_pin_hook"):
                    module._pin_hook.remove()
                    del module._pin_hook


def dynamic(patcher: ModelPatcher, read_again=None) -> Dynamic:
    """A dynamic patcher of a plain one's network. read_again(disable_dynamic) -> a plain patcher of another."""
    found = Dynamic(patcher.model, patcher.load_device, patcher.offload_device)
    found.cached_patcher_init = (read_again, ()) if read_again else None
    return found
