//! The artifacts that stages share: what kinds there are, what a line of each holds, and how to read and write
//! them. These formats are a contract between stages, and with users' own programs.
//!
//! | artifact | content |
//! |---|---|
//! | `items` | JSON Lines `{id, title?, description?, categories?, brand?, domain?, …}`; an object id → fields is read too |
//! | `sequences` | text, one user a line: `user item item …`, oldest first |
//! | `neighbors` | JSON Lines `{id, neighbors: [{id, score}]}`, best first; the reference's object form is read too |
//! | `tids` | JSON Lines: the item's fields + `llm_output, summary_words, similar_item_ids` |
//! | `id2meta` | object id → the `tids` record with hyphenated words |
//! | `sft` | array of `{instruction, input, output}` (alpaca) |
//! | `item_id2tid`, `tid2item_id` | objects id → words, words joined by `,` → ids |
//! | `holdout` | JSON Lines `{user, history: [item], valid, test, group?, domain?}` |
//! | `similar_items` | text: a header, then `anchor top1 … topN` a line |
//! | `checkpoint` | a Hugging Face folder with `grlm.json` |
//! | `rankings` | JSON Lines `{user, split, target, items: [id], scores: [f32], texts?}`, best first |
//! | `metrics` | one object: model → `{"recall@5": …, users, by_group, by_domain}` |
//! | `per_user` | JSON Lines `{user, model, rank or null, group?, domain?}` |
//! | `curve` | JSON Lines `{step, epoch, loss?, lr?, valid_loss?, metric?}` |

use std::fmt;

use serde::{Deserialize, Serialize};

mod check;
pub mod checkpoint;
pub mod fields;
pub mod items;
pub mod jsonl;
pub mod neighbors;
pub mod python_json;
pub mod records;
pub mod sequences;
pub mod text;
pub mod tids;

pub use check::check;
pub use checkpoint::{ChatTemplate, CheckpointInfo, SftFormat, TokenKind};
pub use fields::Fields;
pub use items::Item;
pub use records::{CurvePoint, Holdout, ItemId, Neighbor, Neighbors, PerUser, Ranking, Split, UserId};
pub use sequences::Sequence;
pub use tids::{Id2Meta, TID_LENGTH, TidRecord};

/// What an input or output port holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Artifact {
    Items,
    Sequences,
    Neighbors,
    Tids,
    Id2meta,
    Sft,
    DatasetInfo,
    ItemId2tid,
    Tid2itemId,
    Holdout,
    SimilarItems,
    Checkpoint,
    SasrecModel,
    Rankings,
    Metrics,
    PerUser,
    Curve,
    Prompts,
    /// A JSON object or array without a type of its own: statistics, reports.
    Json,
    /// Any JSON Lines file.
    JsonLines,
    /// Any file or folder.
    Any,
}

impl Artifact {
    pub fn name(self) -> &'static str {
        match self {
            Self::Items => "items",
            Self::Sequences => "sequences",
            Self::Neighbors => "neighbors",
            Self::Tids => "tids",
            Self::Id2meta => "id2meta",
            Self::Sft => "sft",
            Self::DatasetInfo => "dataset_info",
            Self::ItemId2tid => "item_id2tid",
            Self::Tid2itemId => "tid2item_id",
            Self::Holdout => "holdout",
            Self::SimilarItems => "similar_items",
            Self::Checkpoint => "checkpoint",
            Self::SasrecModel => "sasrec_model",
            Self::Rankings => "rankings",
            Self::Metrics => "metrics",
            Self::PerUser => "per_user",
            Self::Curve => "curve",
            Self::Prompts => "prompts",
            Self::Json => "json",
            Self::JsonLines => "json_lines",
            Self::Any => "any",
        }
    }

    /// Whether this artifact is a folder.
    pub fn is_folder(self) -> bool {
        matches!(self, Self::Checkpoint | Self::SasrecModel)
    }

    /// Whether a port of this type may be connected to an output of type `given`. `Any` fits everywhere: what a
    /// user's own program wrote is checked when it is read.
    pub fn accepts(self, given: Self) -> bool {
        self == given
            || self == Self::Any
            || given == Self::Any
            || (self == Self::Items && given == Self::Tids)
            || (self == Self::Json
                && matches!(
                    given,
                    Self::Id2meta
                        | Self::Sft
                        | Self::DatasetInfo
                        | Self::ItemId2tid
                        | Self::Tid2itemId
                        | Self::Metrics
                        | Self::Prompts
                ))
            || (self == Self::JsonLines
                && matches!(
                    given,
                    Self::Items
                        | Self::Neighbors
                        | Self::Tids
                        | Self::Holdout
                        | Self::Rankings
                        | Self::PerUser
                        | Self::Curve
                ))
    }
}

impl fmt::Display for Artifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
