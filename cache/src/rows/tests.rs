//! A namespace used by one and by many: what is found, what survives, what is never served.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use crate::digest::Digest;
use crate::rows::segment;
use crate::rows::{Entry, Imported, Namespace, RowRef, RowStore};
use crate::{Access, StoreError};

struct Bench {
    _dir: TempDir,
    store: RowStore,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let store = RowStore::at(&dir.path().join("rows"), Access::Write);
        Bench { _dir: dir, store }
    }

    fn open(&self) -> Namespace {
        self.store.namespace("n").unwrap()
    }

    fn folder(&self) -> PathBuf {
        self.store.folder().join("n")
    }

    fn segments(&self) -> Vec<PathBuf> {
        segment::list(&self.folder()).unwrap().into_iter().map(|(id, _)| id.path(&self.folder())).collect()
    }

    fn index(&self) -> PathBuf {
        self.store.index.join("n.idx")
    }
}

fn key(n: u64) -> Digest {
    Digest::of(&n.to_le_bytes())
}

fn result(n: u64) -> Vec<u8> {
    format!("result {n}").repeat(1 + n as usize % 5).into_bytes()
}

fn keys(range: std::ops::Range<u64>) -> Vec<Digest> {
    range.map(key).collect()
}

fn fill(rows: &mut Namespace, range: std::ops::Range<u64>) {
    let results: Vec<(Digest, Vec<u8>)> = range.map(|n| (key(n), result(n))).collect();
    rows.append(results.iter().map(|(key, bytes)| (*key, RowRef::Result(bytes)))).unwrap();
}

fn all_there(rows: &mut Namespace, range: std::ops::Range<u64>) -> bool {
    let found = rows.look_up(&keys(range.clone())).unwrap();
    range.zip(found).all(|(n, found)| found == Some(result(n)))
}

#[test]
fn rows_are_found_by_everybody_at_once_and_after_a_kill() {
    let bench = Bench::new();
    let (mut one, mut two) = (bench.open(), bench.open());
    assert_eq!(two.look_up(&keys(0..2)).unwrap(), [None, None]);
    fill(&mut one, 0..100);
    assert!(all_there(&mut one, 0..100) && all_there(&mut two, 0..100));
    fill(&mut two, 100..200);
    fill(&mut one, 200..300);
    assert!(all_there(&mut one, 0..300) && all_there(&mut two, 0..300));
    // A killed process writes no index and syncs nothing.
    std::mem::forget((one, two));
    assert!(all_there(&mut bench.open(), 0..300));
    assert_eq!(bench.segments().len(), 2, "one a writer");
}

#[test]
fn long_results_and_scattered_ones_come_back() {
    let bench = Bench::new();
    let mut rows = bench.open();
    let long: Vec<Vec<u8>> = [0, 1, 4000, 4048, 5000, 3 << 20].map(|n| vec![7; n]).to_vec();
    rows.append(long.iter().zip(0..).map(|(bytes, n)| (key(1000 + n), RowRef::Result(bytes)))).unwrap();
    fill(&mut rows, 0..2000 - 1000);
    let wanted: Vec<Digest> = (0..6).rev().map(|n| key(1000 + n)).collect();
    let found = rows.look_up(&wanted).unwrap();
    assert!(found.into_iter().rev().zip(&long).all(|(found, long)| found.as_ref() == Some(long)));
    let some: Vec<Digest> = (0..1000).step_by(97).map(key).collect();
    assert!(rows.look_up(&some).unwrap().iter().all(Option::is_some));
}

#[test]
fn a_torn_tail_is_left_out_and_what_others_append_is_found() {
    let bench = Bench::new();
    fill(&mut bench.open(), 0..10);
    let segment = &bench.segments()[0];
    let whole = fs::metadata(segment).unwrap().len();
    let last = (crate::rows::record::RECORD_HEADER + result(9).len()) as u64;
    for cut in [1, last / 2, last - 1] {
        fs::OpenOptions::new().write(true).open(segment).unwrap().set_len(whole - cut).unwrap();
        let mut rows = bench.open();
        assert!(all_there(&mut rows, 0..9));
        assert_eq!(rows.look_up(&[key(9)]).unwrap(), [None]);
        fill(&mut rows, 9..10);
        assert!(all_there(&mut bench.open(), 0..10));
        bench.segments()[1..].iter().for_each(|path| fs::remove_file(path).unwrap());
    }
}

#[test]
fn no_flipped_byte_is_ever_served() {
    let bench = Bench::new();
    fill(&mut bench.open(), 0..6);
    let segment = &bench.segments()[0];
    let good = fs::read(segment).unwrap();
    for with_index in [false, true] {
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(segment, &bad).unwrap();
            if !with_index {
                let _ = fs::remove_file(bench.index());
            }
            let found = bench.open().look_up(&keys(0..6)).unwrap();
            let missing = (0..6u64).zip(&found).filter(|(n, f)| f.as_deref() != Some(&result(*n)[..])).count();
            assert!(found.iter().zip(0..).all(|(f, n)| f.is_none() || *f == Some(result(n))), "byte {at}");
            assert!(missing <= 1, "byte {at} costs the row that it is in: {missing}");
        }
        fs::write(segment, &good).unwrap();
        let mut rows = bench.open();
        rows.view.write_index(true);
    }
}

#[test]
fn a_damaged_row_is_served_from_elsewhere_or_computed_again() {
    let bench = Bench::new();
    fill(&mut bench.open(), 0..3);
    let segment = &bench.segments()[0];
    let mut bad = fs::read(segment).unwrap();
    *bad.last_mut().unwrap() ^= 1;
    fs::write(segment, bad).unwrap();
    let mut rows = bench.open();
    assert_eq!(rows.look_up(&[key(2)]).unwrap(), [None]);
    assert_eq!(rows.verify().unwrap(), (3, 1));
    fill(&mut rows, 2..3);
    assert!(all_there(&mut rows, 0..3) && all_there(&mut bench.open(), 0..3));
    drop(rows);
    assert_eq!(bench.open().compact().unwrap(), 2);
    assert_eq!(bench.open().verify().unwrap(), (3, 0));
    assert!(all_there(&mut bench.open(), 0..3));
}

#[test]
fn failures_are_kept_with_their_reason_until_there_is_a_result() {
    let bench = Bench::new();
    let mut rows = bench.open();
    rows.append([(key(1), RowRef::Failure("no answer")), (key(2), RowRef::Failure("too long"))]).unwrap();
    rows.append([(key(1), RowRef::Failure("timed out"))]).unwrap();
    assert_eq!(rows.look_up(&[key(1)]).unwrap(), [None], "it is tried again");
    assert_eq!(rows.entry(&key(1)).unwrap(), Some(Entry::Failure("timed out".into())));
    fill(&mut rows, 2..3);
    assert_eq!(rows.entry(&key(2)).unwrap(), Some(Entry::Result(result(2))));
    let stats = rows.stats().unwrap();
    assert_eq!((stats.results, stats.failures, stats.segments), (1, 1, 1));
    assert_eq!(rows.keys(true).unwrap(), [key(1)]);
    drop(rows);
    assert!(bench.open().drop_failures().unwrap());
    let stats = bench.open().stats().unwrap();
    assert_eq!((stats.results, stats.failures), (1, 0));
}

#[test]
fn the_index_is_written_when_it_is_worth_it_and_any_of_its_ends_costs_nothing() {
    let bench = Bench::new();
    fill(&mut bench.open(), 0..100);
    assert!(!bench.index().exists(), "a scan is as quick");
    fill(&mut bench.open(), 100..6000);
    assert!(bench.index().exists());
    assert!(all_there(&mut bench.open(), 0..6000));
    fill(&mut bench.open(), 6000..6100);
    for damage in ["removed", "garbage", "outdated"] {
        match damage {
            "removed" => fs::remove_file(bench.index()).unwrap(),
            "garbage" => fs::write(bench.index(), "garbage").unwrap(),
            _ => fs::remove_file(&bench.segments()[0]).unwrap(),
        }
        let mut rows = bench.open();
        assert!(all_there(&mut rows, 100..6100), "{damage}");
        assert_eq!(rows.look_up(&[key(0)]).unwrap()[0].is_some(), damage != "outdated");
    }
}

#[test]
fn small_segments_are_merged_beside_readers_and_writers() {
    let bench = Bench::new();
    for n in 0..20 {
        fill(&mut bench.open(), n * 10..n * 10 + 12);
    }
    let mut reader = bench.open();
    assert!(all_there(&mut reader, 0..50));
    let mut writer = bench.open();
    fill(&mut writer, 300..310);
    assert_eq!(bench.open().compact_if_needed().unwrap(), 20);
    assert_eq!(bench.segments().len(), 2, "the merged one, and the one that is being written");
    assert!(all_there(&mut reader, 0..202) && all_there(&mut writer, 0..202));
    fill(&mut writer, 310..320);
    assert!(all_there(&mut reader, 300..320));
    assert_eq!(reader.stats().unwrap().results, 202 + 20);
    assert_eq!(bench.open().compact_if_needed().unwrap(), 0, "few are left alone");
    drop(writer);
    assert_eq!(bench.open().compact().unwrap(), 2);
    assert!(all_there(&mut bench.open(), 0..202));
}

#[test]
fn what_a_killed_compaction_leaves_is_harmless() {
    let bench = Bench::new();
    (0..3).for_each(|n| fill(&mut bench.open(), n * 10..n * 10 + 10));
    // Killed before its segment was placed; and after, before the old ones went.
    fs::write(bench.folder().join(".grlm-abc"), "half").unwrap();
    let first = &bench.segments()[0];
    fs::copy(first, first.with_file_name("0000-copy.rows")).unwrap();
    assert!(all_there(&mut bench.open(), 0..30));
    assert_eq!(bench.open().stats().unwrap().results, 30);
    assert_eq!(bench.open().compact().unwrap(), 4);
    assert!(!bench.folder().join(".grlm-abc").exists());
    assert!(all_there(&mut bench.open(), 0..30));
}

#[test]
fn many_writers_readers_and_compactions_lose_nothing() {
    let bench = Bench::new();
    let writers = AtomicUsize::new(4);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while writers.load(Ordering::Relaxed) > 0 {
                bench.open().compact().unwrap();
            }
        });
        for writer in 0..4u64 {
            let (bench, writers) = (&bench, &writers);
            scope.spawn(move || {
                // Also when it panics: else the compaction would wait for it without end.
                let _done = Leaving(writers);
                for round in 0..15 {
                    let start = writer * 10_000 + round * 20;
                    let mut rows = bench.open();
                    fill(&mut rows, start..start + 10);
                    fill(&mut rows, start + 10..start + 20);
                    for _ in 0..10 {
                        assert!(all_there(&mut rows, writer * 10_000..start + 20));
                        assert!(rows.stats().unwrap().results >= (round + 1) * 20);
                    }
                }
            });
        }
    });
    let mut rows = bench.open();
    assert!((0..4).all(|writer| all_there(&mut rows, writer * 10_000..writer * 10_000 + 300)));
    assert_eq!(rows.stats().unwrap().results, 4 * 300);
}

/// Counts one less when it is dropped.
struct Leaving<'a>(&'a AtomicUsize);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[test]
fn an_append_that_fails_keeps_what_was_there() {
    let bench = Bench::new();
    let mut rows = bench.open();
    fill(&mut rows, 0..5);
    let too_long = vec![0; crate::rows::record::LONGEST_PAYLOAD + 1];
    assert!(rows.append([(key(5), RowRef::Result(&too_long))]).is_err());
    fill(&mut rows, 6..10);
    assert!(all_there(&mut bench.open(), 6..10));
    let mut reader = RowStore::at(bench.store.folder(), Access::Read).namespace("n").unwrap();
    assert!(all_there(&mut reader, 0..5));
    assert!(matches!(reader.append([(key(1), RowRef::Result(b""))]), Err(StoreError::OpenedForReading { .. })));
}

#[test]
fn an_export_goes_into_another_store_and_a_cut_one_is_known_as_such() {
    let (bench, other) = (Bench::new(), Bench::new());
    fill(&mut bench.open(), 0..3000);
    bench.open().append([(key(9999), RowRef::Failure("no"))]).unwrap();
    let mut second = bench.store.namespace("second").unwrap();
    fill(&mut second, 5..6);
    let mut file = Vec::new();
    let names = bench.store.namespaces().unwrap();
    assert_eq!(names, ["n", "second"]);
    assert_eq!(bench.store.export(&names, &mut file, "f".as_ref()).unwrap(), 3001);
    fill(&mut other.open(), 0..10);
    let import = |bytes: &[u8]| other.store.import(&mut &bytes[..], "f".as_ref());
    let cut = import(&file[..file.len() - 10]);
    assert!(matches!(cut, Err(StoreError::BadExport { .. })));
    assert_eq!(import(&file).unwrap(), Imported { new: 0, known: 3001 }, "the rows before the cut were kept");
    assert!(all_there(&mut other.open(), 0..3000));
    assert!(all_there(&mut other.store.namespace("second").unwrap(), 5..6));
    let mut damaged = file.clone();
    damaged[5000] ^= 1;
    assert!(matches!(import(&damaged), Err(StoreError::BadExport { .. })));
    for foreign in [&b"not an export at all"[..], b"x", b""] {
        assert!(matches!(import(foreign), Err(StoreError::NotAnExport { .. })));
    }
    let unknown = bench.store.export(&["x".to_owned()], &mut Vec::new(), "f".as_ref());
    assert!(matches!(unknown, Err(StoreError::Unknown { .. })));
}

#[test]
fn a_namespace_is_dropped_but_for_what_is_being_written() {
    let bench = Bench::new();
    fill(&mut bench.open(), 0..10);
    let mut writer = bench.open();
    fill(&mut writer, 10..20);
    assert!(!bench.store.drop_namespace("n").unwrap());
    assert_eq!(bench.open().look_up(&[key(3)]).unwrap(), [None]);
    assert!(all_there(&mut writer, 10..20));
    drop(writer);
    let mut claimer = bench.open();
    assert_eq!(claimer.claim(&[key(1)]).unwrap(), [true]);
    assert!(!bench.store.drop_namespace("n").unwrap(), "it will be written");
    assert_eq!(bench.open().claim(&[key(1)]).unwrap(), [false]);
    drop(claimer);
    assert!(bench.store.drop_namespace("n").unwrap());
    assert!(bench.store.namespaces().unwrap().is_empty());
    for bad in ["", "a/b", "..", ".x", "é"] {
        assert!(matches!(bench.store.namespace(bad), Err(StoreError::BadName { .. })), "{bad}");
    }
}

#[test]
fn foreign_files_among_segments_do_no_harm() {
    let bench = Bench::new();
    fill(&mut bench.open(), 0..10);
    for (name, content) in [("zzz.rows", "hello, I am no segment at all"), ("empty.rows", ""), ("notes.txt", "x")] {
        fs::File::create(bench.folder().join(name)).unwrap().write_all(content.as_bytes()).unwrap();
    }
    assert!(all_there(&mut bench.open(), 0..10));
}
