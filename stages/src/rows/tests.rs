//! The framework on made-up devices: what is computed, how often, in which order, and what happens when things break.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{MemoryMemo, RowDevice, RowFailure, RowFunction, RowJob, RowKey, RowMemo, RowRecipe, RowResult, Rows, run};
use crate::{Failure, StageContext, StageError, StopFlag, WorkerEvent};

const SPACE: &str = "test";

fn keys(texts: &[String]) -> Vec<RowKey> {
    let recipe = RowRecipe::new(SPACE, 1);
    texts.iter().map(|text| recipe.row().text("text", text).key()).collect()
}

fn texts(rows: usize) -> Vec<String> {
    (0..rows).map(|row| format!("row {row}")).collect()
}

/// A context with so many made-up devices, and what was said in it.
fn context(devices: usize, memo: &MemoryMemo) -> (StageContext, Arc<Mutex<Vec<WorkerEvent>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&events);
    let empty = BTreeMap::new;
    let cx = StageContext::new(empty(), empty(), "scratch".into(), 2, Vec::new(), StopFlag::default(), move |event| {
        sink.lock().unwrap().push(event);
    });
    (cx.with_rows(memo.clone()).with_simulated_devices(devices), events)
}

/// The function of a job in which no row is missing.
type Unneeded = Of<fn(&RowDevice, &[usize]) -> Result<Vec<RowResult>, StageError>>;

/// A row function from a closure over a device and its rows.
struct Of<F>(RowDevice, F);

impl<F: FnMut(&RowDevice, &[usize]) -> Result<Vec<RowResult>, StageError>> RowFunction for Of<F> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        Ok(rows.iter().copied().zip((self.1)(&self.0, rows)?).collect())
    }
}

fn shout(texts: &[String], rows: &[usize]) -> Vec<RowResult> {
    rows.iter().map(|&row| Ok(texts[row].to_uppercase().into_bytes())).collect()
}

fn bytes(rows: &Rows) -> Vec<&[u8]> {
    rows.iter().map(|row| row.unwrap()).collect()
}

#[test]
fn results_stand_in_row_order_whatever_the_devices_and_a_known_row_is_not_computed() {
    let texts = texts(100);
    let mut seen = Vec::new();
    for devices in [0, 1, 2, 8] {
        let memo = MemoryMemo::default();
        let (mut cx, _) = context(devices, &memo);
        let made = AtomicUsize::new(0);
        let job = RowJob::new(SPACE, "row", keys(&texts)).batch(7).costs((0..100).collect());
        let make = |device: RowDevice| {
            made.fetch_add(1, Ordering::Relaxed);
            // So that every device gets some.
            Ok(Of(device, |_: &RowDevice, rows: &[usize]| {
                std::thread::sleep(Duration::from_millis(2));
                Ok(shout(&texts, rows))
            }))
        };
        let rows = run(&mut cx, &job, make).unwrap();
        assert_eq!((rows.known(), rows.computed()), (0, 100));
        assert!(made.load(Ordering::Relaxed) <= devices.max(1));
        seen.push(bytes(&rows).concat());

        let (mut cx, events) = context(devices, &memo);
        let again = run(&mut cx, &job, |_| -> Result<Unneeded, _> { panic!("everything is known") });
        let again = again.unwrap();
        assert_eq!((again.known(), again.computed()), (100, 0));
        let told = |event: &WorkerEvent| match event {
            WorkerEvent::Log { message, .. } => message == "100 of 100 rows are known",
            WorkerEvent::Metric { name, value, .. } => name == "rows.known" && *value == 100.0,
            _ => false,
        };
        assert_eq!(events.lock().unwrap().iter().filter(|event| told(event)).count(), 2);
        assert_eq!(bytes(&again).concat(), seen[0]);
    }
    assert!(seen.iter().all(|bytes| *bytes == seen[0]));
    assert!(seen[0].starts_with(b"ROW 0ROW 1"));
}

#[test]
fn equal_keys_are_computed_once_and_a_changed_row_costs_one() {
    let memo = MemoryMemo::default();
    let mut texts: Vec<String> = ["a", "b", "a", "c", "a"].map(str::to_owned).to_vec();
    let count = |texts: &[String]| {
        let (mut cx, events) = context(1, &memo);
        let make = |device| Ok(Of(device, |_: &RowDevice, rows: &[usize]| Ok(shout(texts, rows))));
        let rows = run(&mut cx, &RowJob::new(SPACE, "row", keys(texts)), make).unwrap();
        let last = events.lock().unwrap().iter().rev().find_map(|e| match e {
            WorkerEvent::Progress { done, total, .. } => Some((*done, *total)),
            _ => None,
        });
        assert_eq!(last, Some((5, 5)));
        (bytes(&rows).concat(), rows.computed())
    };
    assert_eq!(count(&texts), (b"ABACA".to_vec(), 3));
    texts[3] = "d".into();
    assert_eq!(count(&texts), (b"ABADA".to_vec(), 1));
    texts[3] = "c".into();
    assert_eq!(count(&texts), (b"ABACA".to_vec(), 0));
}

/// What is said of 20 items that fail for these reasons, one for each row from the first on.
fn said(reasons: &[&str], names: Option<Vec<String>>) -> StageError {
    let texts = texts(20);
    let (mut cx, _) = context(1, &MemoryMemo::default());
    let mut job = RowJob::new(SPACE, "item", keys(&texts));
    job.names = names;
    let make = |device| {
        Ok(Of(device, |_: &RowDevice, rows: &[usize]| {
            let one = |row: &usize| match reasons.get(*row) {
                Some(reason) => Err(RowFailure::new(*reason)),
                None => Ok(Vec::new()),
            };
            Ok(rows.iter().map(one).collect())
        }))
    };
    run(&mut cx, &job, make).unwrap_err()
}

#[test]
fn rows_that_fail_for_one_reason_say_it_once() {
    let names = || Some((0..20).map(|row| format!("B{row}")).collect());
    let whole = |reasons: &[&str]| said(reasons, names()).to_string();
    assert_eq!(whole(&["busy"]), "1 of 20 items failed; item `B0`: busy");
    assert_eq!(whole(&["busy"; 2]), "2 of 20 items failed; items `B0`, `B1`: busy");
    assert_eq!(whole(&["busy"; 3]), "3 of 20 items failed; items `B0`, `B1`, `B2`: busy");
    assert_eq!(whole(&["busy"; 5]), "5 of 20 items failed; items `B0`, `B1` (and 3 more): busy");
    assert_eq!(said(&["busy"; 5], None).to_string(), "5 of 20 items failed; items 1, 2 (and 3 more): busy");
}

#[test]
fn other_reasons_have_lines_of_their_own_the_commonest_first_and_no_more_than_five() {
    let lines =
        |reasons: &[&str]| -> Vec<String> { said(reasons, None).to_string().lines().map(str::to_owned).collect() };
    assert_eq!(
        lines(&["too long", "busy", "busy", "no answer"]),
        ["4 of 20 items failed", "  items 2, 3: busy", "  item 1: too long", "  item 4: no answer"]
    );
    assert_eq!(lines(&["a", "b", "c", "d", "e"])[5], "  item 5: e");
    let many = lines(&["a", "b", "c", "d", "e", "f", "f", "e", "g"]);
    assert_eq!(
        many[1..],
        ["  items 5, 8: e", "  items 6, 7: f", "  item 1: a", "  item 2: b", "  and 3 items for 3 other reasons"]
    );
}

#[test]
fn a_reason_that_all_rows_share_is_no_single_rows_fault() {
    let texts = texts(9);
    let (mut cx, _) = context(1, &MemoryMemo::default());
    let job = RowJob::new(SPACE, "item", keys(&texts)).max_failed_rows(9);
    let make = |device| {
        Ok(Of(device, |_: &RowDevice, rows: &[usize]| {
            Ok(rows.iter().map(|_| Err(RowFailure::new("the template is broken"))).collect())
        }))
    };
    assert_eq!(run(&mut cx, &job, make).unwrap().failures().count(), 9);
    let error = run(&mut cx, &job.max_failed_rows(8), make).unwrap_err();
    assert_eq!(error.to_string(), "9 of 9 items failed; items 1, 2 (and 7 more): the template is broken");
    let help = "every item failed for the same reason, so it is not the items' fault: mend that and run again";
    assert_eq!(error.help_text(), Some(help));
    assert!(said(&["busy"; 9], None).help_text().unwrap().contains("run again to try these alone"));
}

#[test]
fn failed_rows_are_kept_apart_counted_and_tried_again_alone() {
    let memo = MemoryMemo::default();
    let texts = texts(20);
    let attempt = |bad: &[usize], most: usize| {
        let (mut cx, _) = context(2, &memo);
        let names = (0..20).map(|n| format!("B{n}")).collect();
        let job = RowJob::new(SPACE, "item", keys(&texts)).names(names).batch(3).max_failed_rows(most);
        let make = |device| {
            Ok(Of(device, |_: &RowDevice, rows: &[usize]| {
                let refuse = |row: &usize| bad.contains(row).then(|| Err(RowFailure::new("no answer")));
                Ok(rows.iter().zip(shout(&texts, rows)).map(|(row, r)| refuse(row).unwrap_or(r)).collect())
            }))
        };
        run(&mut cx, &job, make)
    };
    let error = attempt(&[4, 9], 1).unwrap_err();
    assert_eq!(error.failure(), Failure::FailedRows);
    assert_eq!(error.to_string(), "2 of 20 items failed; items `B4`, `B9`: no answer");
    assert_eq!(memo.len(SPACE), 18);
    assert_eq!(memo.failure(SPACE, &keys(&texts)[4]), Some(RowFailure::new("no answer")));
    let rows = attempt(&[9], 1).unwrap();
    assert_eq!((rows.known(), rows.computed()), (18, 2));
    assert_eq!(rows.failures().map(|(row, _)| row).collect::<Vec<_>>(), [9]);
    assert_eq!(attempt(&[], 0).unwrap().computed(), 1);
}

#[test]
fn a_job_that_fails_at_every_row_is_given_up_early() {
    let memo = MemoryMemo::default();
    let texts = texts(10_000);
    let (mut cx, _) = context(1, &memo);
    let job = RowJob::new(SPACE, "item", keys(&texts)).batch(16);
    let broken = |_: &RowDevice, rows: &[usize]| Ok(rows.iter().map(|_| Err(RowFailure::new("broken"))).collect());
    let error = run(&mut cx, &job, |device| Ok(Of(device, broken))).unwrap_err();
    assert!(error.to_string().contains("most of the first 32 rows failed"), "{error}");
    assert_eq!(memo.appended(), 32);
}

#[test]
fn out_of_memory_halves_the_piece_and_gives_memory_back() {
    struct Tight<'a> {
        largest: &'a Mutex<Vec<usize>>,
        freed: &'a AtomicUsize,
        fits: usize,
    }
    impl RowFunction for Tight<'_> {
        fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
            self.largest.lock().unwrap().push(rows.len());
            if rows.len() > self.fits {
                return Err(StageError::OutOfMemory { message: "too many".into(), help: None });
            }
            Ok(rows.iter().map(|&row| (row, Ok(Vec::new()))).collect())
        }

        fn free_memory(&mut self) {
            self.freed.fetch_add(1, Ordering::Relaxed);
        }
    }
    let texts = texts(20);
    let job = RowJob::new(SPACE, "row", keys(&texts)).batch(16);
    let attempt = |fits| {
        let (largest, freed) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
        let (mut cx, _) = context(1, &MemoryMemo::default());
        let outcome = run(&mut cx, &job, |_| Ok(Tight { largest: &largest, freed: &freed, fits }));
        (outcome.map(|rows| rows.computed()), largest.into_inner().unwrap(), freed.into_inner())
    };
    let (computed, sizes, freed) = attempt(5);
    assert_eq!(computed.unwrap(), 20);
    assert_eq!(sizes, [16, 8, 4, 4, 4, 4, 4], "it stays small");
    assert_eq!(freed, 2);
    let (computed, sizes, _) = attempt(0);
    assert_eq!(computed.unwrap_err().failure(), Failure::OutOfMemory);
    assert_eq!(sizes, [16, 8, 4, 2, 1, 1]);
}

#[test]
fn a_lost_device_gives_its_rows_to_the_others_and_the_last_one_ends_the_stage() {
    let texts = texts(50);
    let lost = || StageError::DeviceLost { message: "fell off the bus".into(), help: None };
    for bad in [1, 2, 3] {
        let (mut cx, events) = context(3, &MemoryMemo::default());
        let job = RowJob::new(SPACE, "row", keys(&texts)).batch(4);
        let make = |device: RowDevice| {
            if device.number + 1 == bad && bad == 2 {
                return Err(lost());
            }
            Ok(Of(device, |device: &RowDevice, rows: &[usize]| {
                std::thread::sleep(Duration::from_millis(1));
                if device.number < bad { Err(lost()) } else { Ok(shout(&texts, rows)) }
            }))
        };
        let outcome = run(&mut cx, &job, make);
        if bad == 3 {
            assert_eq!(outcome.unwrap_err().failure(), Failure::DeviceLost);
        } else {
            assert_eq!(outcome.unwrap().computed(), 50);
            let events = events.lock().unwrap();
            let warned = |e: &WorkerEvent| matches!(e, WorkerEvent::Log { message, .. } if message.contains("bus"));
            assert!(events.iter().filter(|e| warned(e)).count() >= 1);
        }
    }
}

#[test]
fn an_error_of_one_device_ends_the_stage_and_keeps_what_was_computed() {
    let texts = texts(40);
    let memo = MemoryMemo::default();
    let (mut cx, _) = context(1, &memo);
    let job = RowJob::new(SPACE, "row", keys(&texts)).batch(10);
    let mut calls = 0;
    let third_fails = move |_: &RowDevice, rows: &[usize]| {
        calls += 1;
        if calls == 3 { Err(StageError::bug("oh")) } else { Ok(rows.iter().map(|_| Ok(vec![1])).collect()) }
    };
    let outcome = run(&mut cx, &job, |device| Ok(Of(device, third_fails)));
    assert_eq!(outcome.unwrap_err().failure(), Failure::Bug);
    assert_eq!(memo.len(SPACE), 20);
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        run(&mut cx, &job, |device| {
            Ok(Of(device, |_: &RowDevice, _: &[usize]| -> Result<Vec<RowResult>, StageError> { panic!("oh no") }))
        })
    }));
    assert_eq!(panics.unwrap_err().downcast_ref::<&str>(), Some(&"oh no"));
}

#[test]
fn a_stop_ends_between_pieces_with_everything_kept() {
    let texts = texts(40);
    let memo = MemoryMemo::default();
    let (mut cx, _) = context(1, &memo);
    let job = RowJob::new(SPACE, "row", keys(&texts)).batch(8);
    let stop = cx.stop_flag();
    let make = |device| {
        Ok(Of(device, |_: &RowDevice, rows: &[usize]| {
            stop.stop();
            Ok(shout(&texts, rows))
        }))
    };
    assert_eq!(run(&mut cx, &job, make).unwrap_err().failure(), Failure::Stopped);
    assert_eq!(memo.len(SPACE), 8);
}

#[test]
fn two_at_once_share_the_work() {
    let texts = texts(60);
    let memo = MemoryMemo::default();
    let computed = AtomicUsize::new(0);
    let both = std::thread::scope(|scope| {
        let attempts = [0, 1].map(|_| {
            scope.spawn(|| {
                let (mut cx, _) = context(2, &memo);
                let job = RowJob::new(SPACE, "row", keys(&texts)).batch(3);
                let make = |device| {
                    Ok(Of(device, |_: &RowDevice, rows: &[usize]| {
                        std::thread::sleep(Duration::from_millis(2));
                        computed.fetch_add(rows.len(), Ordering::Relaxed);
                        Ok(shout(&texts, rows))
                    }))
                };
                let rows = run(&mut cx, &job, make).unwrap();
                assert_eq!(rows.known() + rows.computed(), 60);
                bytes(&rows).concat()
            })
        });
        attempts.map(|attempt| attempt.join().unwrap())
    });
    assert_eq!(both[0], both[1]);
    assert_eq!(computed.into_inner(), 60, "each row once");
}

#[test]
fn rows_that_another_process_has_are_taken_over_when_it_dies() {
    let texts = texts(6);
    let memo = MemoryMemo::default();
    let mut other = memo.clone();
    other.claim(SPACE, &keys(&texts)[2..4]).unwrap();
    let dies = std::thread::spawn({
        let all = keys(&texts);
        move || {
            std::thread::sleep(Duration::from_millis(60));
            other.append(SPACE, &[(all[2], &Ok(b"theirs".to_vec()))]).unwrap();
            other.release(SPACE, &all[2..4]).unwrap();
        }
    });
    let (mut cx, _) = context(1, &memo);
    let make = |device| Ok(Of(device, |_: &RowDevice, rows: &[usize]| Ok(shout(&texts, rows))));
    let rows = run(&mut cx, &RowJob::new(SPACE, "row", keys(&texts)), make).unwrap();
    dies.join().unwrap();
    assert_eq!((rows.known(), rows.computed()), (1, 5));
    assert_eq!(rows.get(2).unwrap(), b"theirs");
    assert_eq!(rows.get(3).unwrap(), b"ROW 3");
}

#[test]
fn every_row_has_a_cost_where_rows_have_costs() {
    let texts = texts(3);
    let (mut cx, _) = context(1, &MemoryMemo::default());
    let job = RowJob::new(SPACE, "row", keys(&texts)).costs(vec![1]);
    let outcome = run(&mut cx, &job, |device| Ok(Of(device, |_: &RowDevice, rows: &[usize]| Ok(shout(&texts, rows)))));
    assert_eq!(outcome.unwrap_err().failure(), Failure::Bug);
}

#[test]
fn cores_are_shared_out_among_made_up_devices() {
    let threads = |devices, cores| -> Vec<usize> {
        let empty = BTreeMap::new;
        let cx = StageContext::new(empty(), empty(), "s".into(), cores, Vec::new(), StopFlag::default(), |_| {});
        cx.with_simulated_devices(devices).row_devices().iter().map(|d| d.threads).collect()
    };
    assert_eq!(threads(0, 3), [3]);
    assert_eq!(threads(2, 3), [2, 1]);
    assert_eq!(threads(3, 1), [1, 1, 1]);
}

#[test]
fn what_comes_early_is_kept_though_the_rest_fails() {
    /// Does one row at a time, the last first, and dies at row 1.
    struct Slow<'a>(&'a [String], RowDevice);
    impl RowFunction for Slow<'_> {
        fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
            let Some(&last) = rows.last() else { return Ok(Vec::new()) };
            self.1.notes.warn(format!("at row {last}"));
            if last == 1 {
                Err(StageError::bug("dead"))
            } else {
                Ok(vec![(last, Ok(self.0[last].clone().into_bytes()))])
            }
        }
    }
    let (texts, memo) = (texts(5), MemoryMemo::default());
    let job = RowJob::new(SPACE, "row", keys(&texts)).batch(5);
    let (mut cx, events) = context(1, &memo);
    assert!(run(&mut cx, &job, |device| Ok(Slow(&texts, device))).unwrap_err().to_string().contains("dead"));
    let warned = |event: &WorkerEvent| matches!(event, WorkerEvent::Log { message, .. } if message == "at row 3");
    assert!(events.lock().unwrap().iter().any(warned));
    let (mut cx, _) = context(1, &memo);
    let mut asked = Vec::new();
    let asked_of = Mutex::new(&mut asked);
    let done = run(&mut cx, &job, |device| {
        Ok(Of(device, |_: &RowDevice, rows: &[usize]| {
            asked_of.lock().unwrap().extend_from_slice(rows);
            Ok(shout(&texts, rows))
        }))
    });
    assert_eq!((done.unwrap().computed(), asked), (2, vec![0, 1]));
}

#[test]
fn a_function_that_returns_other_rows_than_it_was_asked_for_is_found_out() {
    struct Wrong(Vec<(usize, RowResult)>);
    impl RowFunction for Wrong {
        fn compute(&mut self, _: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
            Ok(self.0.clone())
        }
    }
    let job = RowJob::new(SPACE, "row", keys(&texts(2)));
    for wrong in [vec![], vec![(7, Ok(Vec::new()))], vec![(0, Ok(Vec::new())), (0, Ok(Vec::new()))]] {
        let (mut cx, _) = context(1, &MemoryMemo::default());
        let error = run(&mut cx, &job, |_| Ok(Wrong(wrong.clone()))).unwrap_err();
        assert!(error.to_string().contains("something else than results of its rows"), "{error}");
    }
}

/// One that does not come holds up none of the others, and every one is kept as soon as it is there.
#[test]
fn requests_are_under_way_at_all_times_and_no_more_than_allowed() {
    let (memo, texts) = (MemoryMemo::default(), texts(40));
    let (under_way, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let kept_while_the_first_waits = AtomicUsize::new(0);
    let (mut cx, _) = context(1, &memo);
    let job = RowJob::new(SPACE, "row", keys(&texts)).batch(1).requests(4);
    let make = |device| {
        let compute = |_: &RowDevice, rows: &[usize]| {
            most.fetch_max(under_way.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let start = std::time::Instant::now();
            while rows == [0] && memo.len(SPACE) < 39 && start.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(1));
            }
            if rows == [0] {
                kept_while_the_first_waits.store(memo.len(SPACE), Ordering::SeqCst);
            }
            std::thread::sleep(Duration::from_millis(1));
            under_way.fetch_sub(1, Ordering::SeqCst);
            Ok(shout(&texts, rows))
        };
        Ok(Of(device, compute))
    };
    assert_eq!(run(&mut cx, &job, make).unwrap().computed(), 40);
    assert_eq!(kept_while_the_first_waits.into_inner(), 39);
    assert_eq!(most.into_inner(), 4);
}
