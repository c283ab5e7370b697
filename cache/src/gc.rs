//! Making the store smaller, beside running pipelines: by age, by size (what was not used for longest goes first), and
//! always what nobody can use any more (blobs without a record, attempts of dead runs, quarantine).
//!
//! What stays whatever its age: what the caller names (pinned results, named runs), and what runs that go on may use.
//! Nobody waits for a collection, and it needs no word from a run but its start:
//!
//! * Whoever reuses a record dates it ([`Store::touch_record`]; at most once in [`FRESH`]), and whoever finds a blob
//!   that it was about to place touches that.
//! * A record is condemned by moving it to `trash/`, where its date is looked at again, and so are the runs. One that
//!   was used meanwhile, or that a run that goes on may have used, is put back. Who looks for it in between does not
//!   find it, and computes the same result again.
//! * A blob goes only if no record needs it and nothing has touched it since the collection began, or since the oldest
//!   run began that still goes on (its record may be on the way). It is condemned in the same manner.
//! * A collection that dies leaves `trash/`, which the next one empties.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;

use crate::digest::{ActionKey, Digest};
use crate::inventory::{Held, Inventory, latest_ms, milliseconds, remove_tree, touched_ms, tree_bytes};
use crate::record::list;
use crate::signature::now;
use crate::steps::{Step, reach};
use crate::store::{Store, rename_into};
use crate::{Result, StoreError};

/// A record dated within this long is not dated anew when it is used.
pub const FRESH: Duration = Duration::from_secs(600);
/// Dates that the kernel gives may lie this far behind its clock.
const TICK_MS: u64 = 50;
/// Checkpoints and partial work of actions that never finished stay this long.
pub const UNFINISHED_FOR: Duration = Duration::from_secs(14 * 24 * 3600);

/// What must stay.
#[derive(Clone, Debug, Default)]
pub struct InUse {
    pub actions: BTreeSet<ActionKey>,
    /// When the oldest run began that still goes on, in milliseconds since 1970.
    pub running_since_ms: Option<u64>,
}

/// What to collect.
pub struct Collect<'a> {
    /// Bytes that the store should have at most afterwards.
    pub max_bytes: Option<u64>,
    /// Results that were not used for this long go.
    pub max_age: Option<Duration>,
    /// Only say what would go.
    pub dry_run: bool,
    /// Asked twice: at the start, and when records are condemned.
    pub in_use: &'a dyn Fn() -> Result<InUse>,
}

/// An action that went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gone {
    pub key: ActionKey,
    pub pipeline: String,
    pub stage: String,
    /// Milliseconds since 1970.
    pub used_ms: u64,
    /// Of what nothing that stays needs.
    pub bytes: u64,
}

/// What a collection did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    pub actions: Vec<Gone>,
    /// Row namespaces that went.
    pub namespaces: Vec<String>,
    pub blobs: u64,
    /// Everything that was freed.
    pub bytes: u64,
    /// Of it, what nobody could have used: blobs without record, dead attempts, quarantine, temporary files.
    pub garbage: u64,
    /// What the store holds afterwards.
    pub left: u64,
    /// What was to go, and stayed because it is in use.
    pub spared: u64,
}

impl Store {
    /// Dates a record that is used, so that no collector takes it for old. Whether it is still there.
    ///
    /// # Errors
    /// None that matter: who may not date it (another user's, a read-only disk) uses it all the same.
    pub fn touch_record(&self, key: &ActionKey, used_ms: u64) -> bool {
        let is_fresh = now_ms().saturating_sub(used_ms) < millis(fresh());
        if is_fresh || self.require_write().is_err() {
            return true;
        }
        let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
        let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
        let path = self.record_path(key);
        let dated = rustix::fs::utimensat(rustix::fs::CWD, &path, &times, rustix::fs::AtFlags::empty());
        !matches!(dated, Err(rustix::io::Errno::NOENT))
    }

    /// Collects. Only one collection at a time; `None` if another goes on.
    ///
    /// # Errors
    /// The store cannot be read or written. What was condemned by then is gone, the rest is as it was.
    pub fn gc(&self, request: &Collect<'_>) -> Result<Option<Collected>> {
        self.require_write()?;
        let gate = self.root.join("locks").join("gc");
        let Some(_lock) = self.try_lock_path(&gate)? else { return Ok(None) };
        let mut collection = Collection::begin(self, request)?;
        collection.choose()?;
        if !request.dry_run {
            remove_tree(&self.root.join("trash"))?;
            collection.condemn_records()?;
            collection.condemn_blobs()?;
            collection.empty_trash()?;
        }
        let mut done = collection.done;
        done.left = collection.total.saturating_sub(done.bytes);
        if !request.dry_run {
            self.remember_size(done.left);
        }
        Ok(Some(done))
    }
}

struct Collection<'a> {
    store: &'a Store,
    request: &'a Collect<'a>,
    began_ms: u64,
    in_use: InUse,
    inventory: Inventory,
    total: u64,
    victims: Vec<Held>,
    /// Row namespaces to go.
    rows: Vec<PathBuf>,
    done: Collected,
    trash: PathBuf,
}

/// Something that can go as a whole.
enum Candidate<'a> {
    Action(&'a Held),
    Rows(PathBuf),
}

impl<'a> Collection<'a> {
    fn begin(store: &'a Store, request: &'a Collect<'a>) -> Result<Self> {
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

    fn choose(&mut self) -> Result<()> {
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
        for entry in list(&self.store.root.join("rows"))? {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                candidates.push((latest_ms(&entry.path()), Candidate::Rows(entry.path())));
            }
        }
        candidates.sort_by_key(|(used_ms, _)| *used_ms);
        let oldest = self.request.max_age.map(|age| self.began_ms.saturating_sub(millis(age)));
        let (mut victims, mut rows, mut done) = (Vec::new(), Vec::new(), std::mem::take(&mut self.done));
        for (used_ms, candidate) in candidates {
            let too_old = oldest.is_some_and(|oldest| used_ms < oldest);
            let too_much = self.request.max_bytes.is_some_and(|max| self.total.saturating_sub(done.bytes) > max);
            if !too_old && !too_much {
                continue;
            }
            let kept = matches!(&candidate, Candidate::Action(action) if self.in_use.actions.contains(&action.key));
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
                Candidate::Rows(path) => {
                    done.bytes += tree_bytes(&path);
                    done.namespaces.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
                    rows.push(path);
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
        for name in &self.inventory.damaged {
            let (shard, rest) = name.split_at(2);
            garbage.push(self.store.root.join("actions").join(shard).join(rest));
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

    fn condemn_records(&mut self) -> Result<()> {
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
        for path in std::mem::take(&mut self.rows) {
            if !self.may_run(&in_use, latest_ms(&path)) {
                let name = path.file_name().unwrap_or_default();
                move_away(&path, &self.trash.join(name))?;
            }
        }
        self.in_use = in_use;
        Ok(())
    }

    fn condemn_blobs(&mut self) -> Result<()> {
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

    fn empty_trash(&mut self) -> Result<()> {
        remove_tree(&self.trash)?;
        reach(Step::TrashEmptied, &self.trash)
    }
}

/// Whether it was there to be moved.
fn move_away(from: &Path, to: &Path) -> Result<bool> {
    match rename_into(from, to) {
        Ok(()) => Ok(true),
        Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn fresh() -> Duration {
    crate::steps::claimed_fresh().map_or(FRESH, Duration::from_secs)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn now_ms() -> u64 {
    u64::try_from(now() / 1_000_000).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::SystemTime;

    use super::*;
    use crate::Health;
    use crate::testing::{ingested, key, record, staged, store};

    const HOUR: Duration = Duration::from_secs(3600);

    fn nobody() -> Result<InUse> {
        Ok(InUse::default())
    }

    fn collect<'a>(in_use: &'a dyn Fn() -> Result<InUse>) -> Collect<'a> {
        Collect { max_bytes: None, max_age: None, dry_run: false, in_use }
    }

    /// Publishes an action that was last used so many hours ago.
    fn publish(store: &Store, number: u64, text: &str, hours: u32) -> ActionKey {
        let record = record(store, number, text);
        store.publish(&record).unwrap();
        date(store, &record.key, hours);
        record.key
    }

    fn date(store: &Store, key: &ActionKey, hours: u32) {
        let file = fs::File::options().write(true).open(store.record_path(key)).unwrap();
        file.set_modified(SystemTime::now() - hours * HOUR).unwrap();
    }

    /// Blobs that come in just before a collection begins are taken for new.
    fn settle() {
        std::thread::sleep(Duration::from_millis(2 * TICK_MS));
    }

    fn keys(store: &Store) -> BTreeSet<ActionKey> {
        store.keys().unwrap().into_iter().collect()
    }

    #[test]
    fn age_takes_what_was_not_used_and_size_what_was_not_used_for_longest() {
        let (_dir, store) = store();
        let [a, b, c] =
            [(1, 50), (2, 30), (3, 10)].map(|(n, hours)| publish(&store, n, &n.to_string().repeat(5000), hours));
        settle();
        let dry = Collect { max_age: Some(40 * HOUR), dry_run: true, ..collect(&nobody) };
        let foreseen = store.gc(&dry).unwrap().unwrap();
        assert_eq!(foreseen.actions.iter().map(|gone| gone.key).collect::<Vec<_>>(), [a]);
        assert_eq!(keys(&store), BTreeSet::from([a, b, c]), "a dry run changes nothing");
        let done = store.gc(&Collect { dry_run: false, ..dry }).unwrap().unwrap();
        assert_eq!((done.actions, done.bytes, done.blobs), (foreseen.actions, foreseen.bytes, 1));
        assert_eq!(keys(&store), BTreeSet::from([b, c]));
        let done = store.gc(&Collect { max_bytes: Some(done.left - 4000), ..collect(&nobody) }).unwrap().unwrap();
        assert_eq!(done.actions.iter().map(|gone| gone.key).collect::<Vec<_>>(), [b]);
        let content = store.record(&c).unwrap().unwrap().outputs["out"];
        assert_eq!(store.check(&content).unwrap(), Health::Intact);
        assert_eq!(store.usage().unwrap().blob_count, 1);
        assert!(!store.root().join("trash").exists());
    }

    #[test]
    fn what_is_shared_stays_and_what_is_named_stays() {
        let (_dir, store) = store();
        let [old, new] = [(1, 90), (2, 1)].map(|(n, hours)| publish(&store, n, "shared", hours));
        let named = publish(&store, 3, "named", 99);
        settle();
        let in_use = || Ok(InUse { actions: BTreeSet::from([named]), ..InUse::default() });
        let done = store.gc(&Collect { max_age: Some(2 * HOUR), ..collect(&in_use) }).unwrap().unwrap();
        assert_eq!((done.actions.len(), done.blobs, done.spared), (1, 0, 1));
        assert_eq!(keys(&store), BTreeSet::from([new, named]));
        assert!(store.record(&old).unwrap().is_none());
    }

    #[test]
    fn a_run_that_goes_on_keeps_what_it_may_use_and_what_it_is_about_to_publish() {
        let (_dir, store) = store();
        let used = publish(&store, 1, "used by the run", 1);
        let unused = publish(&store, 2, "not used", 30);
        let coming = ingested(&store, "its record is on the way");
        settle();
        let since = now_ms() - millis(2 * HOUR);
        let in_use = || Ok(InUse { running_since_ms: Some(since), ..InUse::default() });
        store.gc(&Collect { max_bytes: Some(0), ..collect(&in_use) }).unwrap().unwrap();
        assert_eq!(keys(&store), BTreeSet::from([used]));
        assert!(store.record(&unused).unwrap().is_none());
        assert_eq!(store.check(&coming).unwrap(), Health::Intact);
        store.gc(&collect(&nobody)).unwrap().unwrap();
        assert!(matches!(store.check(&coming).unwrap(), Health::Missing(_)), "nobody publishes it any more");
    }

    #[test]
    fn a_record_that_is_used_while_it_is_condemned_is_put_back() {
        let (_dir, store) = store();
        let [touched, started, idle] = [1, 2, 3].map(|n| publish(&store, n, &n.to_string(), 30));
        settle();
        let asked = Cell::new(0);
        // The second question comes when all three lie in the trash.
        let in_use = || {
            asked.set(asked.get() + 1);
            if asked.get() == 2 {
                let aside = store.root().join("trash").join(format!("{touched}.json"));
                fs::File::options().write(true).open(aside).unwrap().set_modified(SystemTime::now()).unwrap();
                return Ok(InUse { actions: BTreeSet::from([started]), ..InUse::default() });
            }
            Ok(InUse::default())
        };
        let done = store.gc(&Collect { max_bytes: Some(0), ..collect(&in_use) }).unwrap().unwrap();
        assert_eq!(done.actions.iter().map(|gone| gone.key).collect::<Vec<_>>(), [idle]);
        for key in [touched, started] {
            let content = store.record(&key).unwrap().unwrap().outputs["out"];
            assert_eq!(store.check(&content).unwrap(), Health::Intact);
        }
    }

    #[test]
    fn using_a_record_dates_it_and_tells_when_it_is_gone() {
        let (_dir, store) = store();
        let key = publish(&store, 1, "x", 30);
        let summary = store.summary(&key).unwrap().unwrap();
        assert!(store.touch_record(&key, summary.used_ms));
        assert!(store.summary(&key).unwrap().unwrap().used_ms > summary.used_ms + 1000);
        store.remove_record(&key).unwrap();
        assert!(!store.touch_record(&key, summary.used_ms));
    }

    #[test]
    fn garbage_goes_and_live_work_stays() {
        let (_dir, store) = store();
        let dead = staged(&store, 1, "a dead attempt");
        let kept = store.scratch(&key(1)).join("kept/checkpoint");
        fs::create_dir_all(kept.parent().unwrap()).unwrap();
        fs::write(&kept, "steps").unwrap();
        let live = staged(&store, 2, "a live attempt");
        let _lock = store.try_lock_action(&key(2)).unwrap().unwrap();
        fs::create_dir_all(store.root().join("quarantine")).unwrap();
        fs::write(store.root().join("quarantine/x"), "damaged").unwrap();
        let record = publish(&store, 3, "x", 0);
        fs::write(store.record_path(&record), "damaged").unwrap();
        settle();
        let done = store.gc(&collect(&nobody)).unwrap().unwrap();
        assert!(!dead.exists() && kept.exists() && live.exists() && done.garbage > 0);
        assert_eq!(store.usage().unwrap().quarantine, 0);
        assert!(keys(&store).is_empty());
    }

    #[test]
    fn one_collection_at_a_time() {
        let (_dir, store) = store();
        let inner = || {
            assert_eq!(store.gc(&collect(&nobody)).unwrap(), None);
            Ok(InUse::default())
        };
        assert!(store.gc(&collect(&inner)).unwrap().is_some());
    }

    #[test]
    fn row_namespaces_go_by_age_as_a_whole() {
        let (_dir, store) = store();
        for (name, hours) in [("old", 50), ("new", 1)] {
            let folder = store.root().join("rows").join(name);
            fs::create_dir_all(&folder).unwrap();
            let file = fs::File::create(folder.join("segment")).unwrap();
            let time = SystemTime::now() - hours * HOUR;
            file.set_modified(time).unwrap();
            fs::File::open(&folder).unwrap().set_modified(time).unwrap();
        }
        let done = store.gc(&Collect { max_age: Some(10 * HOUR), ..collect(&nobody) }).unwrap().unwrap();
        assert_eq!(done.namespaces, ["old"]);
        assert!(!store.root().join("rows/old").exists() && store.root().join("rows/new/segment").exists());
    }
}
