//! What the store holds, counted: actions with the blobs that they need, blobs, and everything beside them. The ground
//! on which `du` reports and `gc` decides.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;

use crate::content::{ContentKind, FolderManifest};
use crate::digest::{ActionKey, Digest};
use crate::record::{ActionRecord, list};
use crate::store::Store;
use crate::{Result, StoreError};

/// One finished action, as the store's care sees it.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub key: ActionKey,
    pub pipeline: String,
    pub stage: String,
    /// Milliseconds since 1970; see [`Store::touch_record`].
    pub used_ms: u64,
    /// Of the record itself.
    pub bytes: u64,
    /// Everything it needs, folder manifests included, each once.
    pub blobs: Vec<Digest>,
    /// Namespaces of rows that it was made of.
    pub rows: BTreeSet<String>,
}

/// A blob as it lies there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lying {
    pub bytes: u64,
    /// When it last came in, was asked for or linked; milliseconds since 1970.
    pub touched_ms: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Inventory {
    pub actions: Vec<Held>,
    /// Records that fail their checksum.
    pub damaged: Vec<ActionKey>,
    pub blobs: FxHashMap<Digest, Lying>,
}

/// What one stage of one pipeline holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StageUsage {
    pub pipeline: String,
    pub stage: String,
    pub actions: u64,
    /// Of everything that its results need.
    pub bytes: u64,
    /// Of what nothing else needs.
    pub own_bytes: u64,
    /// Milliseconds since 1970.
    pub used_ms: u64,
}

/// What one namespace of rows holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RowUsage {
    pub namespace: String,
    pub bytes: u64,
    /// Milliseconds since 1970.
    pub used_ms: u64,
}

/// What a store holds, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// By pipeline and stage.
    pub stages: Vec<StageUsage>,
    /// The largest first.
    pub namespaces: Vec<RowUsage>,
    pub blobs: u64,
    pub blob_count: u64,
    /// Of blobs that no record needs.
    pub unreferenced: u64,
    pub records: u64,
    pub rows: u64,
    pub runs: u64,
    /// Unfinished work and checkpoints.
    pub scratch: u64,
    /// Blobs that were not what their name says.
    pub quarantine: u64,
    /// Memories of this and other hosts, temporary files, trash.
    pub rest: u64,
}

impl Usage {
    pub fn total(&self) -> u64 {
        self.blobs + self.records + self.rows + self.runs + self.scratch + self.quarantine + self.rest
    }
}

impl Store {
    /// Counts everything.
    ///
    /// # Errors
    /// A folder that cannot be listed.
    pub fn usage(&self) -> Result<Usage> {
        let inventory = self.inventory()?;
        let mut needed_by: FxHashMap<Digest, (usize, bool)> = FxHashMap::default();
        let mut groups: FxHashMap<(&str, &str), usize> = FxHashMap::default();
        let mut stages: Vec<StageUsage> = Vec::new();
        for action in &inventory.actions {
            let group = *groups.entry((&action.pipeline, &action.stage)).or_insert_with(|| {
                let (pipeline, stage) = (action.pipeline.clone(), action.stage.clone());
                stages.push(StageUsage { pipeline, stage, actions: 0, bytes: 0, own_bytes: 0, used_ms: 0 });
                stages.len() - 1
            });
            stages[group].actions += 1;
            stages[group].used_ms = stages[group].used_ms.max(action.used_ms);
            for blob in &action.blobs {
                needed_by.entry(*blob).and_modify(|(first, only)| *only &= *first == group).or_insert((group, true));
            }
        }
        let mut counted: FxHashSet<(usize, Digest)> = FxHashSet::default();
        for action in &inventory.actions {
            let group = groups[&(action.pipeline.as_str(), action.stage.as_str())];
            for blob in &action.blobs {
                let Some(lying) = inventory.blobs.get(blob).filter(|_| counted.insert((group, *blob))) else {
                    continue;
                };
                stages[group].bytes += lying.bytes;
                stages[group].own_bytes += if needed_by[blob].1 { lying.bytes } else { 0 };
            }
        }
        stages
            .sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| (&a.pipeline, &a.stage).cmp(&(&b.pipeline, &b.stage))));
        let free = inventory.blobs.iter().filter(|(digest, _)| !needed_by.contains_key(digest));
        let mut namespaces: Vec<RowUsage> = self
            .held_rows(&inventory)?
            .into_iter()
            .map(|rows| RowUsage { namespace: rows.name, bytes: rows.bytes, used_ms: rows.used_ms })
            .collect();
        namespaces.sort_by_key(|rows| std::cmp::Reverse(rows.bytes));
        let of = |name: &str| tree_bytes(&self.root.join(name));
        let usage = Usage {
            unreferenced: free.map(|(_, lying)| lying.bytes).sum(),
            blobs: inventory.blobs.values().map(|lying| lying.bytes).sum(),
            blob_count: inventory.blobs.len() as u64,
            records: of("actions"),
            rows: of("rows"),
            runs: of("runs"),
            scratch: of("scratch"),
            quarantine: of("quarantine"),
            rest: ["index", "tmp", "trash", "locks", "latest", "pins"].into_iter().map(of).sum(),
            stages,
            namespaces,
        };
        self.remember_size(usage.total());
        Ok(usage)
    }

    pub(crate) fn inventory(&self) -> Result<Inventory> {
        let mut inventory = Inventory { blobs: self.lying_blobs()?, ..Inventory::default() };
        let mut found: Vec<(String, Metadata)> = Vec::new();
        self.each_sharded("actions", |name, entry| {
            // One that goes away meanwhile was collected by another.
            found.extend(entry.metadata().ok().map(|metadata| (name.to_owned(), metadata)));
            Ok(())
        })?;
        for (name, metadata) in found {
            let Some(Ok(key)) = name.strip_suffix(".json").map(str::parse) else { continue };
            match self.held(&key, &metadata)? {
                Some(held) => inventory.actions.push(held),
                None if self.record_path(&key).exists() => inventory.damaged.push(key),
                None => {}
            }
        }
        Ok(inventory)
    }

    /// `None` if the record cannot be believed.
    pub(crate) fn held(&self, key: &ActionKey, metadata: &Metadata) -> Result<Option<Held>> {
        let Some(ActionRecord { outputs, provenance, rows, .. }) = self.record(key)? else { return Ok(None) };
        let mut blobs = FxHashSet::default();
        for content in outputs.values() {
            blobs.insert(content.digest);
            if content.kind == ContentKind::Folder
                && let Some(manifest) = self.manifest_untouched(&content.digest)
            {
                blobs.extend(manifest.entries().iter().filter_map(|entry| entry.digest));
            }
        }
        Ok(Some(Held {
            key: *key,
            pipeline: provenance.pipeline,
            stage: provenance.stage,
            used_ms: milliseconds(metadata),
            bytes: metadata.len(),
            blobs: blobs.into_iter().collect(),
            rows,
        }))
    }

    /// Reads without leaving a trace in the access time, which tells a collector what is in use.
    fn manifest_untouched(&self, digest: &Digest) -> Option<FolderManifest> {
        let path = self.path_of(digest);
        let mut options = fs::OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOATIME);
        let file = options.open(&path).or_else(|_| fs::File::open(&path)).ok()?;
        FolderManifest::parse(&io::read_to_string(file).ok()?.into_bytes(), *digest).ok()
    }

    fn lying_blobs(&self) -> Result<FxHashMap<Digest, Lying>> {
        let mut blobs = FxHashMap::default();
        self.each_sharded("blobs", |name, entry| {
            if let (Ok(digest), Ok(metadata)) = (name.parse(), entry.metadata()) {
                blobs.insert(digest, Lying { bytes: metadata.len(), touched_ms: touched_ms(&metadata) });
            }
            Ok(())
        })?;
        Ok(blobs)
    }
}

/// The later of access and change.
pub(crate) fn touched_ms(metadata: &Metadata) -> u64 {
    let at = |seconds: i64, nanoseconds: i64| u64::try_from(seconds * 1000 + nanoseconds / 1_000_000).unwrap_or(0);
    at(metadata.atime(), metadata.atime_nsec()).max(at(metadata.ctime(), metadata.ctime_nsec()))
}

/// When it was last modified.
pub(crate) fn milliseconds(metadata: &Metadata) -> u64 {
    let since = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    u64::try_from(since.unwrap_or(Duration::ZERO).as_millis()).unwrap_or(u64::MAX)
}

/// The size of all plain files below a folder; what cannot be read counts nothing.
pub(crate) fn tree_bytes(folder: &Path) -> u64 {
    let mut bytes = 0;
    each_file(folder, &mut |metadata| bytes += metadata.len());
    bytes
}

/// The latest modification of a folder, or of anything below it.
pub(crate) fn latest_ms(folder: &Path) -> u64 {
    let mut latest = fs::metadata(folder).map_or(0, |metadata| milliseconds(&metadata));
    each_file(folder, &mut |metadata| latest = latest.max(milliseconds(metadata)));
    latest
}

fn each_file(folder: &Path, visit: &mut dyn FnMut(&Metadata)) {
    for entry in list(folder).unwrap_or_default() {
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            each_file(&entry.path(), visit);
        } else if metadata.is_file() {
            visit(&metadata);
        }
    }
}

/// Removes a file or a folder with all in it; nothing there is no error.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    let is_folder = fs::symlink_metadata(path).is_ok_and(|there| there.is_dir());
    match if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) } {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", path, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{record, staged, store};

    #[test]
    fn shared_and_own_bytes_are_told_apart() {
        let (_dir, store) = store();
        let mut first = record(&store, 1, "shared");
        first.outputs.insert("more".into(), store.ingest(&staged(&store, 1, "own")).unwrap());
        first.provenance.stage = "a".into();
        store.publish(&first).unwrap();
        let mut second = record(&store, 2, "shared");
        second.provenance.stage = "b".into();
        store.publish(&second).unwrap();
        store.ingest(&staged(&store, 3, "nobody's")).unwrap();
        let usage = store.usage().unwrap();
        let figures: Vec<_> = usage.stages.iter().map(|s| (s.stage.as_str(), s.bytes, s.own_bytes)).collect();
        assert_eq!(figures, [("a", 9, 3), ("b", 6, 0)]);
        assert_eq!((usage.blobs, usage.blob_count, usage.unreferenced), (17, 3, 8));
        assert!(usage.records > 0 && usage.total() > 17);
    }
}
