//! The recorded action that differs least from another one, in whatever pipeline and run it was made: what `explain`
//! compares with.

use std::cmp::Reverse;

use grlm_cache::{ActionKey, ActionRecord, Store, StoreError};
use rayon::prelude::*;
use serde::Deserialize;

use crate::key::Manifest;

/// An earlier action, and what is different now.
#[derive(Debug)]
pub struct Nearest {
    pub record: ActionRecord,
    /// A line each.
    pub differences: Vec<String>,
}

/// The record of the same kind with the fewest differences, this action's own left out. Among equals, one of a stage of
/// this name counts for nearer, then the latest.
///
/// # Errors
/// The store cannot be read.
pub fn nearest(
    store: &Store,
    key: &ActionKey,
    manifest: &Manifest,
    stage: &str,
) -> Result<Option<Nearest>, StoreError> {
    let keys = store.keys()?;
    let candidates = keys.par_iter().filter(|other| *other != key).filter_map(|other| {
        // A record that cannot be read is none to compare with.
        let record = store.record(other).ok().flatten()?;
        let earlier = Manifest::deserialize(&record.manifest).ok()?;
        if earlier.kind != manifest.kind {
            return None;
        }
        let differences = manifest.diff(&earlier).iter().map(ToString::to_string).collect();
        Some(Nearest { record, differences })
    });
    Ok(candidates.min_by_key(|nearest| {
        let other_stage = name_of(&nearest.record) != stage;
        (nearest.differences.len(), other_stage, Reverse(nearest.record.started_ms), nearest.record.key)
    }))
}

/// The stage that made it, without its variant.
fn name_of(record: &ActionRecord) -> &str {
    let label = record.provenance.stage.as_str();
    label.split_once('@').map_or(label, |(stage, _)| stage)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use grlm_cache::{Access, RECORD_FORMAT};
    use serde_json::{Value, json};

    use super::*;
    use crate::engine::attempt::provenance;

    fn manifest(kind: &str, params: Value) -> Manifest {
        Manifest {
            version: crate::key::VERSION,
            kind: kind.into(),
            code: "c0de".into(),
            params,
            inputs: BTreeMap::new(),
            code_files: BTreeMap::new(),
            models: BTreeMap::new(),
            env: BTreeMap::new(),
            device: None,
            outputs: BTreeMap::new(),
        }
    }

    fn publish(store: &Store, manifest: &Manifest, stage: &str, started_ms: u64) {
        let record = ActionRecord {
            format: RECORD_FORMAT,
            key: manifest.key(),
            manifest: serde_json::to_value(manifest).unwrap(),
            outputs: BTreeMap::new(),
            started_ms,
            duration_ms: 1,
            peak_memory: 0,
            peak_gpu_memory: None,
            rows: BTreeSet::new(),
            provenance: provenance("run", "p", stage),
            accepted: None,
        };
        store.publish(&record).unwrap();
    }

    #[test]
    fn the_fewest_differences_count_then_the_name_then_the_date() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), Access::Write).unwrap();
        let now = manifest("tid", json!({"a": 1, "b": 1}));
        let found = || nearest(&store, &now.key(), &now, "s").unwrap().map(|near| near.differences.join("; "));
        publish(&store, &now, "s", 9);
        publish(&store, &manifest("sasrec", json!({"a": 1, "b": 1})), "s", 9);
        assert_eq!(found(), None, "neither the action itself nor another kind");
        publish(&store, &manifest("tid", json!({"a": 2, "b": 2})), "s", 8);
        assert_eq!(found().as_deref(), Some("`with.a` 2 → 1; `with.b` 2 → 1"));
        publish(&store, &manifest("tid", json!({"a": 3, "b": 1})), "other", 7);
        assert_eq!(found().as_deref(), Some("`with.a` 3 → 1"), "nearer, though older and of another stage");
        publish(&store, &manifest("tid", json!({"a": 4, "b": 1})), "s@v", 5);
        assert_eq!(found().as_deref(), Some("`with.a` 4 → 1"), "of the same stage");
        publish(&store, &manifest("tid", json!({"a": 5, "b": 1})), "s", 6);
        assert_eq!(found().as_deref(), Some("`with.a` 5 → 1"), "later");
    }
}
