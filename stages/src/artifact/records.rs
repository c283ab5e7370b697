//! One Rust type for a line of each artifact.

use std::{borrow::Borrow, fmt};

use serde::{Deserialize, Serialize};

/// An item's id: opaque, as the catalogue spells it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ItemId(pub String);

/// A user's id: opaque, as the sequences spell it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UserId(pub String);

macro_rules! id {
    ($id:ident) => {
        impl $id {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        /// Maps keyed by the id can be asked with a `&str`: both hash alike.
        impl Borrow<str> for $id {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $id {
            fn from(id: &str) -> Self {
                Self(id.to_owned())
            }
        }

        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(ItemId);
id!(UserId);

/// One neighbour and its cosine similarity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Neighbor {
    pub id: ItemId,
    pub score: f64,
}

/// A line of `neighbors`, best first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Neighbors {
    pub id: ItemId,
    pub neighbors: Vec<Neighbor>,
}

/// A line of `holdout`: one user under leave-one-out. `history` holds the training items, oldest first; then came
/// `valid`, then `test`. `group` is the user's group by length of history, `domain` the domain of the test item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Holdout {
    pub user: UserId,
    pub history: Vec<ItemId>,
    pub valid: ItemId,
    pub test: ItemId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
}

/// Which held-out item a ranking is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    Valid,
    Test,
}

/// A line of `rankings`, best first; `scores[i]` belongs to `items[i]`, higher is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ranking {
    pub user: UserId,
    pub split: Split,
    pub target: ItemId,
    pub items: Vec<ItemId>,
    pub scores: Vec<f32>,
    /// What the model wrote, one text a beam, where a language model did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub texts: Option<Vec<String>>,
}

/// A line of `per_user`: the target's 1-based rank in a model's list, or `None` if it is not in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PerUser {
    pub user: UserId,
    pub model: String,
    pub split: Split,
    pub rank: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
}

/// A line of `curve`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    pub step: u64,
    pub epoch: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_loss: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<f64>,
}
