//! One collection: what may go, and how it goes.

use std::fs;
use std::path::{Path, PathBuf};

use rustc_hash::{FxHashMap, FxHashSet};

use super::{Collect, Collected, Gone, GoneRows, InUse, TICK_MS, UNFINISHED_FOR, fresh, millis, now_ms};
use crate::Result;
use crate::digest::{ActionKey, Digest};
use crate::inventory::{Held, Inventory, latest_ms, milliseconds, remove_tree, touched_ms, tree_bytes};
use crate::record::list;
use crate::rows::{HeldRows, may_be_written};
use crate::steps::{Step, reach};
use crate::store::{Store, move_away, rename_into};

pub(super) struct Collection<'a> {
    store: &'a Store,
    request: &'a Collect<'a>,
    began_ms: u64,
    in_use: InUse,
    inventory: Inventory,
    pub total: u64,
    victims: Vec<Held>,
    /// Row namespaces to go.
    rows: Vec<HeldRows>,
    pub done: Collected,
    trash: PathBuf,
}

/// Something that can go as a whole.
enum Candidate<'a> {
    Action(&'a Held),
    Rows(HeldRows),
}

impl<'a> Collection<'a> {
    pub fn begin(store: &'a Store, request: &'a Collect<'a>) -> Result<Self> {
        let began_ms = now_ms().saturating_sub(TICK_MS);
        let in_use = (request.in_use)()?;
        let inventory = store.inventory()?;
        let total = tree_bytes(&store.root);
        let trash = store.root.join("trash");
        let (victims, rows, done) = (Vec::new(), Vec::new(), Collected::default());
        Ok(Self { store, request, began_ms, in_use, inventory, total, victims, rows, done, trash })
    }

    /// Whether something last used then may be in use.
    fn may_run(&self, in_use: &InUse, used_ms: u64) -> bool {
        in_use.running_since_ms.is_some_and(|since| used_ms >= since.saturating_sub(millis(fresh())))
    }

    pub fn choose(&mut self) -> Result<()> {
        self.collect_garbage()?;
        // How many records that stay need each blob.
        let mut needed: FxHashMap<Digest, u32> = FxHashMap::default();
        for action in &self.inventory.actions {
            for blob in &action.blobs {
                *needed.entry(*blob).or_default() += 1;
            }
        }
        for (digest, lying) in &self.inventory.blobs {
            if !needed.contains_key(digest) && !self.may_run(&self.in_use, lying.touched_ms) {
                self.done.blobs += 1;
                self.done.garbage += lying.bytes;
                self.done.bytes += lying.bytes;
            }
        }
        let mut candidates: Vec<(u64, Candidate<'_>)> =
            self.inventory.actions.iter().map(|action| (action.used_ms, Candidate::Action(action))).collect();
        let namespaces = self.store.held_rows(&self.inventory)?;
        candidates.extend(namespaces.into_iter().map(|rows| (rows.used_ms, Candidate::Rows(rows))));
        candidates.sort_by_key(|(used_ms, _)| *used_ms);
        let oldest = self.request.max_age.map(|age| self.began_ms.saturating_sub(millis(age)));
        let (mut victims, mut rows, mut done) = (Vec::new(), Vec::new(), std::mem::take(&mut self.done));
        for (used_ms, candidate) in candidates {
            let too_old = oldest.is_some_and(|oldest| used_ms < oldest);
            let too_much = self.request.max_bytes.is_some_and(|max| self.total.saturating_sub(done.bytes) > max);
            if !too_old && !too_much {
                continue;
            }
            let kept = match &candidate {
                Candidate::Action(action) => self.in_use.actions.contains(&action.key),
                Candidate::Rows(rows) => rows.is_needed_by(&self.in_use.actions),
            };
            if kept || self.may_run(&self.in_use, used_ms) {
                done.spared += 1;
                continue;
            }
            match candidate {
                Candidate::Action(action) => {
                    let mut bytes = action.bytes;
                    for blob in &action.blobs {
                        let Some(count) = needed.get_mut(blob) else { continue };
                        *count -= 1;
                        let lying = self.inventory.blobs.get(blob).filter(|_| *count == 0);
                        if let Some(lying) = lying.filter(|lying| !self.may_run(&self.in_use, lying.touched_ms)) {
                            bytes += lying.bytes;
                            done.blobs += 1;
                        }
                    }
                    done.bytes += bytes;
                    done.actions.push(Gone {
                        key: action.key,
                        pipeline: action.pipeline.clone(),
                        stage: action.stage.clone(),
                        used_ms,
                        bytes,
                    });
                    victims.push(action.clone());
                }
                Candidate::Rows(namespace) => {
                    done.bytes += namespace.bytes;
                    done.namespaces.push(GoneRows { name: namespace.name.clone(), used_ms, bytes: namespace.bytes });
                    rows.push(namespace);
                }
            }
        }
        (self.victims, self.rows, self.done) = (victims, rows, done);
        Ok(())
    }

    /// What nobody can use: damaged records, quarantine, attempts of dead runs, temporary files, old trash.
    fn collect_garbage(&mut self) -> Result<()> {
        let mut garbage: Vec<PathBuf> = Vec::new();
        garbage.extend(list(&self.store.root.join("quarantine"))?.into_iter().map(|entry| entry.path()));
        for key in std::mem::take(&mut self.inventory.damaged) {
            // Who holds it may be about to publish it anew, or has done so since it was listed.
            let Some(_lock) = self.store.try_lock_action(&key)? else { continue };
            if self.store.record(&key)?.is_none() {
                self.drop_garbage(&self.store.record_path(&key))?;
            }
        }
        let idle = self.in_use.running_since_ms.unwrap_or(u64::MAX).min(self.began_ms);
        let is_older = |path: &Path, than_ms: u64| latest_ms(path) < than_ms;
        for entry in list(&self.store.root.join("tmp"))? {
            garbage.extend(Some(entry.path()).filter(|path| is_older(path, idle)));
        }
        for entry in list(&self.store.root.join("scratch"))? {
            let Some(Ok(key)) = entry.file_name().to_str().map(str::parse::<ActionKey>) else { continue };
            // Its lock says whether somebody works on it.
            let Some(_lock) = self.store.try_lock_action(&key)? else { continue };
            let unfinished = self.began_ms.saturating_sub(millis(UNFINISHED_FOR));
            if is_older(&entry.path(), unfinished) || self.store.record_path(&key).exists() {
                self.drop_garbage(&entry.path())?;
                continue;
            }
            for attempt in list(&entry.path())? {
                if attempt.file_name().as_encoded_bytes().starts_with(b"attempt-") {
                    self.drop_garbage(&attempt.path())?;
                }
            }
        }
        for path in garbage {
            self.drop_garbage(&path)?;
        }
        Ok(())
    }

    fn drop_garbage(&mut self, path: &Path) -> Result<()> {
        let bytes = if path.is_dir() { tree_bytes(path) } else { fs::metadata(path).map_or(0, |m| m.len()) };
        self.done.garbage += bytes;
        self.done.bytes += bytes;
        if self.request.dry_run { Ok(()) } else { remove_tree(path) }
    }

    pub fn condemn_records(&mut self) -> Result<()> {
        let mut condemned: Vec<(Held, PathBuf)> = Vec::new();
        for held in std::mem::take(&mut self.victims) {
            let aside = self.trash.join(format!("{}.json", held.key));
            if move_away(&self.store.record_path(&held.key), &aside)? {
                condemned.push((held, aside.clone()));
            }
            reach(Step::RecordCondemned, &aside)?;
        }
        let in_use = (self.request.in_use)()?;
        for (held, aside) in condemned {
            let used_ms = fs::metadata(&aside).map_or(0, |metadata| milliseconds(&metadata));
            let used = used_ms > held.used_ms || self.may_run(&in_use, used_ms) || in_use.actions.contains(&held.key);
            let path = self.store.record_path(&held.key);
            if used && !path.exists() {
                rename_into(&aside, &path)?;
                self.done.spared += 1;
                if let Some(place) = self.done.actions.iter().position(|gone| gone.key == held.key) {
                    self.done.bytes -= self.done.actions.remove(place).bytes;
                }
            }
        }
        for rows in std::mem::take(&mut self.rows) {
            let used_ms = latest_ms(&rows.path);
            let used = used_ms > rows.used_ms || rows.is_needed_by(&in_use.actions) || may_be_written(&rows.path);
            if used || self.may_run(&in_use, used_ms) {
                self.spare(&rows);
                continue;
            }
            let aside = self.trash.join(format!("{}.rows", rows.name));
            move_away(&rows.path, &aside)?;
            // A run that began since may have opened it before it was moved.
            if latest_ms(&aside) > used_ms || may_be_written(&aside) {
                put_rows_back(&aside, &rows.path)?;
                self.spare(&rows);
            }
        }
        self.in_use = in_use;
        Ok(())
    }

    fn spare(&mut self, rows: &HeldRows) {
        self.done.spared += 1;
        self.done.bytes -= rows.bytes;
        self.done.namespaces.retain(|gone| gone.name != rows.name);
    }

    pub fn condemn_blobs(&mut self) -> Result<()> {
        // Read anew: runs have published meanwhile, and what was condemned is gone.
        let before_ms = now_ms().saturating_sub(TICK_MS);
        let inventory = self.store.inventory()?;
        let needed: FxHashSet<&Digest> = inventory.actions.iter().flat_map(|action| &action.blobs).collect();
        let since = self.in_use.running_since_ms.map_or(u64::MAX, |since| since.saturating_sub(millis(fresh())));
        let cutoff = before_ms.min(since);
        let accounted = self.done.bytes;
        let mut freed = 0;
        self.done.blobs = 0;
        for (digest, lying) in inventory.blobs.iter().filter(|(digest, _)| !needed.contains(digest)) {
            let path = self.store.path_of(digest);
            if fs::symlink_metadata(&path).map_or(u64::MAX, |metadata| touched_ms(&metadata)) >= cutoff {
                continue;
            }
            let aside = self.trash.join(digest.hex());
            if !move_away(&path, &aside)? {
                continue;
            }
            reach(Step::BlobCondemned, &aside)?;
            // The move changed the ctime; a touch would have changed the access time as well.
            use std::os::unix::fs::MetadataExt;
            let read_ms = fs::symlink_metadata(&aside).map_or(0, |m| m.atime() * 1000 + m.atime_nsec() / 1_000_000);
            if u64::try_from(read_ms).unwrap_or(0) >= cutoff && !path.exists() {
                rename_into(&aside, &path)?;
                continue;
            }
            self.done.blobs += 1;
            freed += lying.bytes;
        }
        tracing::debug!(accounted, freed, "collected blobs");
        Ok(())
    }

    pub fn empty_trash(&mut self) -> Result<()> {
        remove_tree(&self.trash)?;
        reach(Step::TrashEmptied, &self.trash)
    }
}

/// Moves a namespace's files where they were, beside what was begun there meanwhile.
fn put_rows_back(aside: &Path, folder: &Path) -> Result<()> {
    match rename_into(aside, folder) {
        Err(_) if folder.exists() => {}
        moved => return moved,
    }
    for entry in list(aside)? {
        let place = folder.join(entry.file_name());
        if !place.exists() {
            rename_into(&entry.path(), &place)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_put_back_lie_beside_what_was_begun_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let (aside, folder) = (dir.path().join("trash/n.rows"), dir.path().join("rows/n"));
        for begun in [false, true] {
            fs::create_dir_all(&aside).unwrap();
            fs::write(aside.join("1.rows"), "old").unwrap();
            if begun {
                fs::write(folder.join("2.rows"), "new").unwrap();
            }
            put_rows_back(&aside, &folder).unwrap();
            assert_eq!(fs::read_to_string(folder.join("1.rows")).unwrap(), "old");
        }
        assert_eq!(fs::read_to_string(folder.join("2.rows")).unwrap(), "new");
    }
}
