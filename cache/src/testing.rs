//! What the unit tests of this crate share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use tempfile::TempDir;

use crate::{Access, ActionKey, ActionRecord, Content, Digest, Provenance, RECORD_FORMAT, Store};

pub(crate) fn store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store"), Access::Write).unwrap();
    (dir, store)
}

pub(crate) fn key(number: u64) -> ActionKey {
    ActionKey(Digest::of(&number.to_le_bytes()))
}

/// A file with this text in a new attempt's folder.
pub(crate) fn staged(store: &Store, number: u64, text: &str) -> PathBuf {
    let path = store.new_attempt(&key(number)).unwrap().join("out");
    std::fs::write(&path, text).unwrap();
    path
}

pub(crate) fn ingested(store: &Store, text: &str) -> Content {
    store.ingest(&staged(store, u64::MAX, text)).unwrap()
}

/// A record, not yet published, whose one output holds the text.
pub(crate) fn record(store: &Store, number: u64, text: &str) -> ActionRecord {
    ActionRecord {
        format: RECORD_FORMAT,
        key: key(number),
        manifest: serde_json::json!({ "kind": "test", "with": { "number": number } }),
        outputs: BTreeMap::from([("out".to_owned(), ingested(store, text))]),
        started_ms: 1_700_000_000_000,
        duration_ms: 7,
        peak_memory: 1 << 20,
        peak_gpu_memory: None,
        rows: BTreeSet::new(),
        provenance: Provenance { stage: "s".into(), ..Provenance::default() },
        accepted: None,
    }
}
