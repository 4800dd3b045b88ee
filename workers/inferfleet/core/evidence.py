"""Evidence under the name by which core knows it; it is a noun, for it is stored and only adds up."""

from inferfleet.evidence import CANARY as CANARY
from inferfleet.evidence import CONTROL as CONTROL
from inferfleet.evidence import Arm as Arm
from inferfleet.evidence import Evidence as Evidence
from inferfleet.evidence import Values as Values
from inferfleet.evidence import arm_of as arm_of
from inferfleet.evidence import evidence_bytes as evidence_bytes
from inferfleet.evidence import evidence_of as evidence_of
