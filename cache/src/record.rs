//! Action records: what an action was (its manifest), what it made, and what that cost. A record is the store's word
//! that the outputs are there; it is published after them.
//!
//! `actions/ab/cdef….json` is one JSON object, `{"checksum":"<BLAKE3 of the record's text>","record":{…}}`. A file that
//! fails its checksum (a power cut, a bad disk) is no record; `verify` lists it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::content::Content;
use crate::digest::{ActionKey, Digest};
use crate::steps::{Step, reach, synced};
use crate::store::{Store, rename_into};
use crate::{Result, StoreError, sync};

/// The format of the records this program writes, and the only one that it reads.
pub const RECORD_FORMAT: u32 = 1;

/// One finished action.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActionRecord {
    pub format: u32,
    pub key: ActionKey,
    /// Everything that the key is the hash of, so that two actions can be compared; opaque here.
    pub manifest: serde_json::Value,
    /// By the output's name.
    pub outputs: BTreeMap<String, Content>,
    /// Milliseconds since 1970.
    pub started_ms: u64,
    pub duration_ms: u64,
    /// Bytes.
    pub peak_memory: u64,
    /// Bytes held at most on one GPU, where that was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_gpu_memory: Option<u64>,
    /// Namespaces of the rows that it is made of, which are kept as long as it is: with them, a change of one row costs
    /// one row.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub rows: BTreeSet<String>,
    pub provenance: Provenance,
    /// Set when the result was adopted from another action instead of computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<Accepted>,
}

/// Who made a result, and where; never part of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    pub host: String,
    pub user: String,
    pub grlm_version: String,
    pub run: String,
    pub pipeline: String,
    pub stage: String,
}

/// A result that a user declared valid under another key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    pub from_key: ActionKey,
    pub reason: String,
    /// Milliseconds since 1970.
    pub at_ms: u64,
}

/// A record without its manifest and provenance: all that deciding "is it cached" needs, and much faster to read.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ActionSummary {
    pub format: u32,
    pub key: ActionKey,
    pub outputs: BTreeMap<String, Content>,
    pub started_ms: u64,
    pub duration_ms: u64,
    pub peak_memory: u64,
    #[serde(default)]
    pub accepted: Option<Accepted>,
    /// When it was last used, as far as its date tells; milliseconds since 1970. See [`Store::touch_record`].
    #[serde(skip)]
    pub used_ms: u64,
}

const PREFIX: &str = "{\"checksum\":\"";
const MIDDLE: &str = "\",\"record\":";
const SUFFIX: &str = "}\n";

impl Store {
    /// The record of an action, or `None` if there is none, or none that can be believed.
    pub fn record(&self, key: &ActionKey) -> Result<Option<ActionRecord>> {
        let found: Option<(ActionRecord, u64)> = self.read_record(key)?;
        Ok(found.map(|(record, _)| record).filter(|record| record.format == RECORD_FORMAT && record.key == *key))
    }

    /// The same without manifest and provenance; a few microseconds.
    pub fn summary(&self, key: &ActionKey) -> Result<Option<ActionSummary>> {
        let Some((found, used_ms)) = self.read_record::<ActionSummary>(key)? else { return Ok(None) };
        let found = ActionSummary { used_ms, ..found };
        Ok(Some(found).filter(|record| record.format == RECORD_FORMAT && record.key == *key))
    }

    /// Whether there is a record of this action, unread, which is used now: it is dated.
    pub fn has_record(&self, key: &ActionKey) -> bool {
        let found = fs::metadata(self.record_path(key)).ok().filter(|found| found.len() > 0);
        found.is_some_and(|found| self.touch_record(key, crate::inventory::milliseconds(&found)))
    }

    /// Publishes a record whose outputs have all been ingested: atomic, and on disk as [`crate::sync`] says. A record
    /// under the same key is replaced.
    pub fn publish(&self, record: &ActionRecord) -> Result<()> {
        let path = self.record_path(&record.key);
        let text = encode(record).map_err(|error| StoreError::io("write", &path, io::Error::other(error)))?;
        let must_sync = record.duration_ms >= sync::SYNC_STAGE_MS;
        if must_sync {
            self.sync()?;
        }
        let mut staged = self.temporary()?;
        staged.write_all(text.as_bytes()).map_err(StoreError::while_doing("write", staged.path()))?;
        reach(Step::RecordStaged, &path)?;
        if must_sync {
            staged.as_file().sync_all().map_err(StoreError::while_doing("sync", staged.path()))?;
            synced(&path);
            reach(Step::RecordSynced, &path)?;
        }
        rename_into(staged.path(), &path)?;
        // The name has moved: nothing is left to delete.
        let _ = staged.into_temp_path().keep();
        reach(Step::RecordPlaced, &path)?;
        if must_sync {
            return path.parent().map_or(Ok(()), sync::sync_path);
        }
        self.pending.defer(path);
        if self.pending.is_due() { self.sync() } else { Ok(()) }
    }

    /// Forgets an action; its blobs stay until they are collected.
    pub fn remove_record(&self, key: &ActionKey) -> Result<bool> {
        self.require_write()?;
        let path = self.record_path(key);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StoreError::io("remove", &path, error)),
        }
    }

    /// The keys of all records, in no particular order; files that are not named like one are passed over.
    pub fn keys(&self) -> Result<Vec<ActionKey>> {
        let mut keys = Vec::new();
        self.each_sharded("actions", |name, _| {
            if let Some(Ok(key)) = name.strip_suffix(".json").map(str::parse) {
                keys.push(key);
            }
            Ok(())
        })?;
        Ok(keys)
    }

    pub(crate) fn record_path(&self, key: &ActionKey) -> PathBuf {
        let hex = key.0.hex();
        let (shard, rest) = hex.split_at(2);
        let mut path = self.root.join("actions");
        path.push(shard);
        path.push(format!("{rest}.json"));
        path
    }

    /// With the date of its file.
    fn read_record<T: DeserializeOwned>(&self, key: &ActionKey) -> Result<Option<(T, u64)>> {
        let path = self.record_path(key);
        let read = || -> io::Result<(Vec<u8>, u64)> {
            let mut file = fs::File::open(&path)?;
            let metadata = file.metadata()?;
            let mut text = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0) + 1);
            file.read_to_end(&mut text)?;
            Ok((text, crate::inventory::milliseconds(&metadata)))
        };
        let (text, used_ms) = match read() {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("read", &path, error)),
        };
        let found = body_of(&text).and_then(|body| serde_json::from_slice(body).ok());
        if found.is_none() {
            tracing::warn!(path = %path.display(), "not a whole record, so it does not count");
        }
        Ok(found.map(|found| (found, used_ms)))
    }

    /// Calls `visit(name, path)` for each file `folder/ab/cdef…`, with `name` being `abcdef…`.
    pub(crate) fn each_sharded(
        &self,
        folder: &str,
        mut visit: impl FnMut(&str, &fs::DirEntry) -> Result<()>,
    ) -> Result<()> {
        let folder = self.root.join(folder);
        for shard in list(&folder)? {
            let shard_name = shard.file_name();
            let Some(shard_name) = shard_name.to_str().filter(|name| name.len() == 2) else { continue };
            for entry in list(&shard.path())? {
                if let Some(rest) = entry.file_name().to_str() {
                    visit(&format!("{shard_name}{rest}"), &entry)?;
                }
            }
        }
        Ok(())
    }
}

/// The entries of a folder; none if it is not there (any more).
pub(crate) fn list(folder: &std::path::Path) -> Result<Vec<fs::DirEntry>> {
    match fs::read_dir(folder).and_then(Iterator::collect) {
        Ok(entries) => Ok(entries),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(StoreError::io("list", folder, error)),
    }
}

fn encode(record: &ActionRecord) -> serde_json::Result<String> {
    let body = serde_json::to_string(record)?;
    Ok(format!("{PREFIX}{}{MIDDLE}{body}{SUFFIX}", Digest::of(body.as_bytes())))
}

/// The record's own text, if the checksum holds.
fn body_of(text: &[u8]) -> Option<&[u8]> {
    let rest = text.strip_prefix(PREFIX.as_bytes())?;
    let (checksum, rest) = rest.split_at_checked(64)?;
    let body = rest.strip_prefix(MIDDLE.as_bytes())?.strip_suffix(SUFFIX.as_bytes())?;
    let checksum: Digest = std::str::from_utf8(checksum).ok()?.parse().ok()?;
    (checksum == Digest::of(body)).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{record, store};

    #[test]
    fn a_published_record_is_found_whole_and_short() {
        let (_dir, store) = store();
        let record = record(&store, 1, "output");
        assert_eq!(store.record(&record.key).unwrap(), None);
        store.publish(&record).unwrap();
        assert_eq!(store.record(&record.key).unwrap().as_ref(), Some(&record));
        let summary = store.summary(&record.key).unwrap().unwrap();
        assert_eq!((summary.outputs, summary.duration_ms), (record.outputs.clone(), record.duration_ms));
        assert_eq!(store.keys().unwrap(), [record.key]);
        let text = fs::read_to_string(store.record_path(&record.key)).unwrap();
        assert!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["record"]["outputs"].is_object());
        assert!(store.remove_record(&record.key).unwrap());
        assert!(!store.remove_record(&record.key).unwrap());
    }

    #[test]
    fn a_slow_stage_is_published_too() {
        let (_dir, store) = store();
        let mut record = record(&store, 1, "output");
        record.duration_ms = sync::SYNC_STAGE_MS;
        store.publish(&record).unwrap();
        assert!(store.record(&record.key).unwrap().is_some());
    }

    #[test]
    fn a_damaged_or_misplaced_record_does_not_count() {
        let (_dir, store) = store();
        let record = record(&store, 1, "output");
        store.publish(&record).unwrap();
        let path = store.record_path(&record.key);
        let whole = fs::read(&path).unwrap();
        for cut in [0, 10, 80, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(store.record(&record.key).unwrap(), None, "cut at {cut}");
        }
        for place in (0..whole.len()).step_by(7) {
            let mut flipped = whole.clone();
            flipped[place] ^= 4;
            fs::write(&path, &flipped).unwrap();
            assert_eq!(store.summary(&record.key).unwrap(), None, "flipped at {place}");
        }
        let other = ActionKey(Digest::of(b"other"));
        fs::create_dir_all(store.record_path(&other).parent().unwrap()).unwrap();
        fs::write(store.record_path(&other), &whole).unwrap();
        assert_eq!(store.record(&other).unwrap(), None, "a record under another key's name");
    }
}
