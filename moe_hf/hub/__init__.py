"""Save a model whole or not at all, push it to the Hub in one commit, and pull it back proven.

Pickles, training state and secrets stay behind; what arrived is compared with what was sent, checksum by checksum.
"""

from moe_hf.hub.contents import NEVER_PUSHED
from moe_hf.hub.model import check_vocabulary, push_model, save_model
from moe_hf.hub.pull import pull_folder
from moe_hf.hub.push import push_folder


__all__ = ["NEVER_PUSHED", "check_vocabulary", "pull_folder", "push_folder", "push_model", "save_model"]
