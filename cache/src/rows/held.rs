//! Namespaces as the store's care sees them: their size, and when they were used last.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::Result;
use crate::digest::ActionKey;
use crate::inventory::{Inventory, latest_ms, tree_bytes};
use crate::store::Store;

/// A namespace, which is kept or goes as a whole.
#[derive(Clone, Debug)]
pub(crate) struct HeldRows {
    pub name: String,
    pub path: PathBuf,
    pub bytes: u64,
    /// When a row came in or was looked up, or a result that was made from them was used: the last of these, in
    /// milliseconds since 1970.
    pub used_ms: u64,
    /// Actions whose results were made from them.
    made: BTreeSet<ActionKey>,
}

impl HeldRows {
    /// Whether one of these results was made from it.
    pub fn is_needed_by(&self, actions: &BTreeSet<ActionKey>) -> bool {
        !self.made.is_disjoint(actions)
    }
}

impl Store {
    /// All namespaces, by name.
    pub(crate) fn held_rows(&self, inventory: &Inventory) -> Result<Vec<HeldRows>> {
        let rows = self.rows();
        let held = |name: String| {
            let path = rows.folder().join(&name);
            let made = || inventory.actions.iter().filter(|action| action.rows.contains(&name));
            let used_ms = made().map(|action| action.used_ms).fold(latest_ms(&path), u64::max);
            let made = made().map(|action| action.key).collect();
            HeldRows { bytes: tree_bytes(&path), used_ms, made, name, path }
        };
        Ok(rows.namespaces()?.into_iter().map(held).collect())
    }
}
