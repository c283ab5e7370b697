//! What goes, what stays, and what comes back.

use std::cell::Cell;
use std::fs;
use std::time::SystemTime;

use super::*;
use crate::rows::{RowRef, RowStore};
use crate::testing::{ingested, key, record, staged, store};
use crate::{Access, ActionRecord, Digest, Health};

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
fn rows_that_somebody_writes_stay_however_old() {
    let (_dir, store) = store();
    let write = |name| {
        let mut rows = store.rows().namespace(name).unwrap();
        rows.append([(Digest::of(b"row"), RowRef::Result(b"result"))]).unwrap();
        rows
    };
    let writer = write("written");
    drop(write("idle"));
    settle();
    let done = store.gc(&Collect { max_bytes: Some(0), ..collect(&nobody) }).unwrap().unwrap();
    assert_eq!((done.namespaces.len(), done.spared), (1, 1));
    assert_eq!(store.rows().namespaces().unwrap(), ["written"]);
    drop(writer);
    let found = store.rows().namespace("written").unwrap().look_up(&[Digest::of(b"row")]).unwrap();
    assert_eq!(found, [Some(b"result".to_vec())]);
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
    // Of an action that a run holds, which will publish it anew.
    let held = publish(&store, 4, "y", 0);
    fs::write(store.record_path(&held), "damaged").unwrap();
    let _held = store.try_lock_action(&held).unwrap().unwrap();
    settle();
    let done = store.gc(&collect(&nobody)).unwrap().unwrap();
    assert!(!dead.exists() && kept.exists() && live.exists() && done.garbage > 0);
    assert_eq!(store.usage().unwrap().quarantine, 0);
    assert_eq!(keys(&store), BTreeSet::from([held]));
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

/// Keeps a row, and dates its namespace so many hours ago.
fn keep_row(store: &Store, name: &str, hours: u32) {
    let mut namespace = store.rows().namespace(name).unwrap();
    namespace.append([(key(1).0, RowRef::Result(b"row"))]).unwrap();
    drop(namespace);
    let folder = store.root().join("rows").join(name);
    let time = SystemTime::now() - hours * HOUR;
    let files = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    for path in files.chain([folder.clone()]).collect::<Vec<_>>() {
        fs::File::open(path).unwrap().set_modified(time).unwrap();
    }
}

fn gone(done: &Collected) -> Vec<&str> {
    done.namespaces.iter().map(|rows| rows.name.as_str()).collect()
}

fn namespaces(store: &Store) -> Vec<String> {
    store.rows().namespaces().unwrap()
}

#[test]
fn rows_count_as_used_when_they_are_looked_up_and_with_the_results_made_from_them() {
    let (_dir, store) = store();
    ["unused", "looked-up", "used", "pinned"].iter().for_each(|name| keep_row(&store, name, 50));
    store.rows().namespace("looked-up").unwrap().look_up(&[key(1).0]).unwrap();
    let made_of = |number: u64, name: &str, hours: u32| {
        let record = ActionRecord { rows: BTreeSet::from([name.to_owned()]), ..record(&store, number, name) };
        store.publish(&record).unwrap();
        date(&store, &record.key, hours);
        record.key
    };
    made_of(1, "used", 1);
    made_of(2, "unused", 60);
    let pinned = made_of(3, "pinned", 60);
    settle();
    let in_use = || Ok(InUse { actions: BTreeSet::from([pinned]), ..InUse::default() });
    let done = store.gc(&Collect { max_age: Some(10 * HOUR), ..collect(&in_use) }).unwrap().unwrap();
    assert_eq!(gone(&done), ["unused"]);
    assert_eq!(namespaces(&store), ["looked-up", "pinned", "used"]);
    let read = RowStore::at(store.rows().folder(), Access::Read);
    keep_row(&store, "looked-up", 50);
    read.namespace("looked-up").unwrap().look_up(&[key(1).0]).unwrap();
    let done = store.gc(&Collect { max_age: Some(10 * HOUR), ..collect(&in_use) }).unwrap().unwrap();
    assert_eq!(gone(&done), ["looked-up"], "who only looks at a store changes nothing");
}

#[test]
fn rows_that_are_used_while_they_are_condemned_stay() {
    let (_dir, store) = store();
    ["one", "other"].iter().for_each(|name| keep_row(&store, name, 50));
    settle();
    let asked = Cell::new(0);
    let in_use = || {
        asked.set(asked.get() + 1);
        if asked.get() == 2 {
            store.rows().namespace("one").unwrap().look_up(&[key(1).0]).unwrap();
        }
        Ok(InUse::default())
    };
    let done = store.gc(&Collect { max_age: Some(10 * HOUR), ..collect(&in_use) }).unwrap().unwrap();
    assert_eq!((gone(&done), done.spared), (vec!["other"], 1));
    assert_eq!(namespaces(&store), ["one"]);
}

#[test]
fn row_namespaces_go_by_age_as_a_whole() {
    let (_dir, store) = store();
    for (name, hours) in [("old", 50), ("new", 1)] {
        keep_row(&store, name, hours);
    }
    let done = store.gc(&Collect { max_age: Some(10 * HOUR), ..collect(&nobody) }).unwrap().unwrap();
    assert_eq!(gone(&done), ["old"]);
    assert_eq!(namespaces(&store), ["new"]);
}
