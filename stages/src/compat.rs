//! The `compat` parameter that stages with a counterpart among the published scripts share.
//!
//! Where a published script is wrong, `fixed` does what its author meant and `reference` does what it did, byte for
//! byte. Each stage's own module docs list the differences.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which behaviour to follow where the published scripts are known to be wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compat {
    /// The intended behaviour.
    #[default]
    Fixed,
    /// The published scripts' behaviour, mistakes included, so that their files can be reproduced exactly.
    Reference,
}

impl Compat {
    pub fn is_reference(self) -> bool {
        self == Self::Reference
    }
}
