//! Reading everything again: whether each record can be believed and each blob is what its name says.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use rustc_hash::FxHashMap;
use serde::Serialize;

use crate::blobs::Health;
use crate::digest::{ActionKey, Digest};
use crate::rows::HeldRows;
use crate::store::Store;
use crate::{Result, StoreError};

/// What [`Store::verify`] found wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Flaw {
    /// The record fails its checksum.
    Record { name: String },
    /// The blob is not what its name says; it was moved aside, if the store can be written.
    Damaged { digest: Digest, moved: bool },
    /// Records need a blob that is not there.
    Missing { digest: Digest },
    /// Rows of a namespace are damaged; they were left out, if the store can be written.
    Rows { namespace: String, damaged: u64, left_out: bool },
}

/// A flaw, and whose results it spoils.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    #[serde(flatten)]
    pub flaw: Flaw,
    /// `pipeline/stage`, with the action's key: they run again when they are needed.
    pub spoils: Vec<(String, ActionKey)>,
    /// The records of the spoiled results were removed, so that they are found once; not in a store that cannot be
    /// written, nor while somebody works on them.
    pub forgotten: bool,
}

/// The outcome of [`Store::verify`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub records: u64,
    pub blobs: u64,
    /// Results of single rows, and failures.
    pub rows: u64,
    pub bytes: u64,
    pub findings: Vec<Finding>,
}

impl Store {
    /// Reads every record, every blob and every row. `progress` is told bytes done and in all, from several threads.
    ///
    /// # Errors
    /// Something that cannot be read at all.
    pub fn verify(&self, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Verified> {
        let inventory = self.inventory()?;
        let mut needed: FxHashMap<Digest, Vec<(String, ActionKey)>> = FxHashMap::default();
        for action in &inventory.actions {
            for blob in &action.blobs {
                needed.entry(*blob).or_default().push((format!("{}/{}", action.pipeline, action.stage), action.key));
            }
        }
        let namespaces = self.held_rows(&inventory)?;
        let of_rows: u64 = namespaces.iter().map(|rows| rows.bytes).sum();
        let total = of_rows + inventory.blobs.values().map(|lying| lying.bytes).sum::<u64>();
        let done = AtomicU64::new(0);
        let mut damaged = inventory
            .blobs
            .par_iter()
            .map(|(digest, lying)| {
                let health = self.rehash_blob(digest)?;
                progress(done.fetch_add(lying.bytes, Ordering::Relaxed) + lying.bytes, total);
                Ok(match health {
                    Health::Damaged { quarantined, .. } => {
                        Some(Flaw::Damaged { digest: *digest, moved: quarantined.is_some() })
                    }
                    // One that is gone was collected meanwhile.
                    Health::Intact | Health::Missing(_) => None,
                })
            })
            .filter_map(Result::transpose)
            .collect::<std::result::Result<Vec<Flaw>, StoreError>>()?;
        damaged.sort_by_key(|flaw| format!("{flaw:?}"));
        let (mut rows, mut damaged_rows) = (0, Vec::new());
        for HeldRows { name, bytes, .. } in namespaces {
            let mut namespace = self.rows().namespace(&name)?;
            let (records, damaged) = namespace.verify()?;
            rows += records;
            if damaged > 0 {
                // Merging keeps what is whole.
                let left_out = self.require_write().is_ok() && namespace.compact()? > 0;
                damaged_rows.push(Flaw::Rows { namespace: name, damaged, left_out });
            }
            progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
        }
        // Blobs were listed first: a record that was published since may need one that came later.
        let is_missing = |digest: &&Digest| !inventory.blobs.contains_key(digest) && !self.path_of(digest).exists();
        let mut missing: Vec<Digest> = needed.keys().filter(is_missing).copied().collect();
        missing.sort_unstable();
        let flaws = (inventory.damaged.iter().map(|key| Flaw::Record { name: format!("{}.json", key.0.hex()) }))
            .chain(damaged)
            .chain(missing.into_iter().map(|digest| Flaw::Missing { digest }))
            .chain(damaged_rows);
        let mut spoils = |flaw: &Flaw| match flaw {
            Flaw::Record { .. } | Flaw::Rows { .. } => Vec::new(),
            Flaw::Damaged { digest, .. } | Flaw::Missing { digest } => needed.remove(digest).unwrap_or_default(),
        };
        let findings = flaws
            .map(|flaw| {
                let spoils = spoils(&flaw);
                let forgotten = self.forget(&flaw, &spoils)?;
                Ok(Finding { flaw, spoils, forgotten })
            })
            .collect::<Result<Vec<Finding>>>()?;
        let (records, blobs) = (inventory.actions.len() as u64, inventory.blobs.len() as u64);
        Ok(Verified { records, blobs, rows, bytes: total, findings })
    }

    /// Removes the records that a blob spoils which is still not there. Whether all are gone.
    fn forget(&self, flaw: &Flaw, spoils: &[(String, ActionKey)]) -> Result<bool> {
        let (Flaw::Damaged { digest, .. } | Flaw::Missing { digest }) = flaw else { return Ok(false) };
        if self.require_write().is_err() || spoils.is_empty() {
            return Ok(false);
        }
        let mut all = true;
        for (_, key) in spoils {
            // Whoever holds it may be about to bring the blob back, and publishes the record anew after that.
            let Some(_lock) = self.try_lock_action(key)? else {
                all = false;
                continue;
            };
            let Ok(metadata) = fs::metadata(self.record_path(key)) else { continue };
            let needs = self.held(key, &metadata)?.is_some_and(|held| held.blobs.contains(digest));
            if needs && !self.path_of(digest).exists() {
                self.remove_record(key)?;
            } else {
                all = false;
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::rows::RowRef;
    use crate::testing::{record, store};

    #[test]
    fn damaged_rows_are_found_once_and_left_out() {
        let (_dir, store) = store();
        let mut rows = store.rows().namespace("n").unwrap();
        let keys: Vec<Digest> = (0..3u8).map(|n| Digest::of(&[n])).collect();
        rows.append(keys.iter().map(|key| (*key, RowRef::Result(b"a result")))).unwrap();
        drop(rows);
        let sound = store.verify(&|_, _| ()).unwrap();
        assert_eq!((sound.rows, sound.findings.len()), (3, 0));
        let folder = store.rows().folder().join("n");
        let segment =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).find(|p| p.extension().is_some()).unwrap();
        let mut bytes = fs::read(&segment).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&segment, bytes).unwrap();
        let found = store.verify(&|_, _| ()).unwrap().findings;
        let flaw = Flaw::Rows { namespace: "n".into(), damaged: 1, left_out: true };
        assert_eq!(found, [Finding { flaw, spoils: Vec::new(), forgotten: false }]);
        let after = store.verify(&|_, _| ()).unwrap();
        assert_eq!((after.rows, after.findings.len()), (2, 0));
    }

    #[test]
    fn a_record_that_was_published_anew_meanwhile_stays() {
        let (_dir, store) = store();
        let stale = record(&store, 1, "before");
        let fresh = record(&store, 1, "after");
        assert_eq!(stale.key, fresh.key);
        store.publish(&fresh).unwrap();
        let gone = stale.outputs["out"].digest;
        fs::remove_file(store.path_of(&gone)).unwrap();
        let spoils = vec![("/s".to_owned(), stale.key)];
        assert!(!store.forget(&Flaw::Missing { digest: gone }, &spoils).unwrap());
        assert!(store.has_record(&fresh.key));
    }

    #[test]
    fn every_kind_of_damage_is_found_and_a_sound_store_has_none() {
        let (_dir, store) = store();
        let records: Vec<_> = (0..4u64).map(|n| record(&store, n, &format!("text {n}"))).collect();
        records.iter().for_each(|record| store.publish(record).unwrap());
        let sound = store.verify(&|_, _| ()).unwrap();
        assert_eq!((sound.records, sound.blobs, sound.bytes, sound.findings.len()), (4, 4, 24, 0));
        let blob = |n: usize| store.path_of(&records[n].outputs["out"].digest);
        // Of the same size, and as if nobody had touched it.
        let times = fs::metadata(blob(0)).unwrap().modified().unwrap();
        fs::set_permissions(blob(0), fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(blob(0), "tExt 0").unwrap();
        fs::File::options().write(true).open(blob(0)).unwrap().set_modified(times).unwrap();
        fs::remove_file(blob(1)).unwrap();
        fs::write(store.record_path(&records[2].key), "{}").unwrap();
        let found = store.verify(&|_, _| ()).unwrap().findings;
        let name = |n: usize| vec![("/s".to_owned(), records[n].key)];
        let digest = |n: usize| records[n].outputs["out"].digest;
        assert_eq!(found.len(), 3);
        assert!(matches!(found[0].flaw, Flaw::Record { .. }));
        let moved = Flaw::Damaged { digest: digest(0), moved: true };
        assert_eq!(found[1], Finding { flaw: moved, spoils: name(0), forgotten: true });
        assert_eq!(found[2], Finding { flaw: Flaw::Missing { digest: digest(1) }, spoils: name(1), forgotten: true });
        let again = store.verify(&|_, _| ()).unwrap();
        assert_eq!((again.records, again.findings.len()), (1, 1), "spoiled results are found once");
        assert!(matches!(again.findings[0].flaw, Flaw::Record { .. }), "a collection removes it");
    }
}
