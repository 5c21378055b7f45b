"""For people who write a method: tiny networks and data, and the contract that every module of the package keeps.

::

    def build(student, teachers, num_classes):
        return MyModule(student, teachers, num_classes=num_classes)

    def test_contract():
        assert_module_contract(build)
"""

from distill_lightning.testing.contract import CONTRACT, Build, assert_module_contract
from distill_lightning.testing.tiny import TinyDataModule, TinyNet, tiny_trainer

__all__ = ["CONTRACT", "Build", "TinyDataModule", "TinyNet", "assert_module_contract", "tiny_trainer"]
