//! Running a job: look up, spread the missing rows over the devices, keep results as they come, collect in order.

use std::{
    any::Any,
    collections::{HashMap, HashSet, VecDeque},
    panic::AssertUnwindSafe,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Notes, RowDevice, RowFailure, RowFunction, RowJob, RowKey, RowMemo, RowResult, Rows,
    share::{Next, Share},
};
use crate::{StageContext, StageError};

/// How often the calling thread looks for progress to tell and a stop to pass on.
const TICK: Duration = Duration::from_millis(50);
/// Between two looks at rows that another process computes.
const REVISIT: Duration = Duration::from_millis(50);
/// Frames of deep recursion must fit; pages are only taken when touched.
const STACK: usize = 64 << 20;
/// A thread that only waits for a server needs less, and there may be thousands.
const STACK_OF_REQUESTS: usize = 2 << 20;
/// Lines in which an error tells why rows failed.
const LINES: usize = 5;

/// Computes what is missing of `job` on the attempt's devices and returns all results, in the order of rows.
///
/// `make` is called once a device, on a thread of its own, and not at all when every row is known.
///
/// # Errors
/// What `make` or a [`RowFunction`] returned that no other device or smaller piece could mend; more failed rows than
/// the job allows; a stop; a memo that cannot be used. What was computed until then is kept, and a rerun goes on.
pub fn run<F: RowFunction>(
    cx: &mut StageContext,
    job: &RowJob,
    make: impl Fn(RowDevice) -> Result<F, StageError> + Sync,
) -> Result<Rows, StageError> {
    let mut memo = cx.take_rows();
    let outcome = Run::new(job, memo.as_mut()).and_then(|run| run.drive(cx, memo.as_mut(), &make));
    // Also after a failure: what was computed until then is worth as much.
    let synced = memo.sync();
    cx.put_rows(memo);
    let rows = outcome?;
    synced?;
    judge(cx, job, rows)
}

/// A job whose keys were looked up.
struct Run<'a> {
    job: &'a RowJob,
    /// Row → distinct row.
    of_row: Vec<u32>,
    /// Distinct row → its first row.
    first: Vec<usize>,
    weight: Vec<u32>,
    results: Vec<Option<RowResult>>,
}

impl<'a> Run<'a> {
    fn new(job: &'a RowJob, memo: &mut dyn RowMemo) -> Result<Self, StageError> {
        if job.costs.as_ref().is_some_and(|costs| costs.len() != job.keys.len()) {
            return Err(StageError::bug("a row job must have one cost for each key"));
        }
        if u32::try_from(job.keys.len()).is_err() {
            return Err(StageError::bug("a row job has more rows than can be counted"));
        }
        let mut numbers: HashMap<&RowKey, u32> = HashMap::with_capacity(job.keys.len());
        let (mut of_row, mut first, mut weight) = (Vec::with_capacity(job.keys.len()), Vec::new(), Vec::new());
        for (row, key) in job.keys.iter().enumerate() {
            let number = *numbers.entry(key).or_insert_with(|| {
                first.push(row);
                weight.push(0);
                (first.len() - 1) as u32
            });
            weight[number as usize] += 1;
            of_row.push(number);
        }
        let keys: Vec<RowKey> = first.iter().map(|&row| job.keys[row]).collect();
        let results = memo.look_up(&job.namespace, &keys)?.into_iter().map(|found| found.map(Ok)).collect();
        Ok(Self { job, of_row, first, weight, results })
    }

    fn drive<F: RowFunction>(
        self,
        cx: &mut StageContext,
        memo: &mut dyn RowMemo,
        make: &(impl Fn(RowDevice) -> Result<F, StageError> + Sync),
    ) -> Result<Rows, StageError> {
        let total = self.job.keys.len() as u64;
        let mut open: Vec<u32> = (0..self.first.len() as u32).filter(|&n| self.results[n as usize].is_none()).collect();
        if let Some(costs) = &self.job.costs {
            open.sort_by_key(|&n| std::cmp::Reverse(costs[self.first[n as usize]]));
        }
        let missing = open.len();
        let mut devices = match self.job.requests {
            Some(at_once) => cx.row_requests(at_once),
            None => cx.row_devices(),
        };
        devices.truncate(missing.max(1));
        let batch = (self.job.batch.max(1) >> cx.out_of_memory_before().min(31)).max(1);
        let mut share = Share::new(self.results, self.weight, VecDeque::from(open), self.job.max_failed_rows);
        cx.progress(share.done_rows, total, &self.job.unit);
        if share.known > 0 {
            cx.info(format!("{} of {total} {}s are known", share.done_rows, self.job.unit));
        }
        if missing == 0 {
            cx.metric("rows.known", share.known as f64, None);
            cx.metric("rows.computed", 0.0, None);
            return share.into_rows(self.of_row);
        }
        cx.check_stop()?;
        share.running = devices.len();
        let wanted = devices.len();
        let mut threads = wanted;
        let requests = self.job.requests.is_some();
        let (stack, what) = if requests { (STACK_OF_REQUESTS, "request") } else { (STACK, "device") };
        let notes: Vec<Notes> = devices.iter().map(|device| device.notes.clone()).collect();
        let workshop = Workshop {
            job: self.job,
            first: &self.first,
            batch,
            share: Mutex::new(share),
            changed: Condvar::new(),
            memo: Mutex::new(memo),
            panic: Mutex::new(None),
        };
        std::thread::scope(|scope| {
            let workshop = &workshop;
            for device in devices {
                let number = device.number;
                let started = std::thread::Builder::new()
                    .name(format!("{} rows {number}", self.job.unit))
                    .stack_size(stack)
                    .spawn_scoped(scope, move || workshop.device(&device, make));
                let Err(error) = started else { continue };
                let error = StageError::io("start a thread for", format!("{what} {number}"), error);
                if !requests {
                    workshop.lock().end_device(Err(error));
                    continue;
                }
                // Where one cannot be started the next cannot, and fewer requests at once are no harm.
                threads = number;
                workshop.lock().not_started(wanted - threads, threads > 0, error);
                break;
            }
            workshop.watch(cx, total, &notes);
        });
        if let Some(panic) = workshop.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            std::panic::resume_unwind(panic);
        }
        let mut share = workshop.share.into_inner().unwrap_or_else(PoisonError::into_inner);
        for error in &share.lost {
            cx.warn(match requests {
                true => format!("{error}: {threads} requests were under way at once, and not {wanted}"),
                false => format!("{error}; its rows went to the other devices"),
            });
        }
        if let Some(seconds) = share.seconds_per_row() {
            // A server's rows overlap: what a plan makes of it is the time until all are there.
            let at_once = if requests { threads } else { 1 };
            cx.metric("rows.seconds_per_row", seconds / at_once as f64, None);
        }
        cx.metric("rows.known", share.known as f64, None);
        cx.metric("rows.computed", share.computed as f64, None);
        if let Some(error) = share.error.take() {
            return Err(error);
        }
        share.into_rows(self.of_row)
    }
}

/// What the devices' threads work with.
struct Workshop<'a> {
    job: &'a RowJob,
    /// Distinct row → its first row.
    first: &'a [usize],
    batch: usize,
    share: Mutex<Share>,
    /// Rows were finished or given back, or a device ended.
    changed: Condvar,
    memo: Mutex<&'a mut dyn RowMemo>,
    /// What a row function panicked with; goes on in the calling thread.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<'a> Workshop<'a> {
    fn lock(&self) -> MutexGuard<'_, Share> {
        // Every method of `Share` leaves it whole; row functions run outside the lock.
        self.share.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memo(&self) -> MutexGuard<'_, &'a mut dyn RowMemo> {
        self.memo.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells progress, and what devices have to say, until every device's thread has ended.
    fn watch(&self, cx: &mut StageContext, total: u64, notes: &[Notes]) {
        let mut told = None;
        loop {
            let share = self.lock();
            let (share, _) = self.changed.wait_timeout(share, TICK).unwrap_or_else(PoisonError::into_inner);
            let (done, ended) = (share.rows_with_results(), share.running == 0);
            drop(share);
            if told.replace(done) != Some(done) {
                cx.progress(done, total, &self.job.unit);
            }
            notes.iter().flat_map(Notes::take).for_each(|note| cx.warn(note));
            if ended {
                return;
            }
        }
    }

    /// The life of one device's thread.
    fn device<F: RowFunction>(&self, device: &RowDevice, make: &impl Fn(RowDevice) -> Result<F, StageError>) {
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| self.work(device, make)));
        let outcome = outcome.unwrap_or_else(|panic| {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            Err(StageError::bug("a row function panicked"))
        });
        self.lock().end_device(outcome);
        self.changed.notify_all();
    }

    fn work<F: RowFunction>(
        &self,
        device: &RowDevice,
        make: &impl Fn(RowDevice) -> Result<F, StageError>,
    ) -> Result<(), StageError> {
        let mut hand = Hand { device, make, function: None, limit: self.batch };
        loop {
            if device.stop.is_set() {
                return Err(StageError::Stopped);
            }
            let mut share = self.lock();
            match share.next(hand.limit) {
                Next::End => return Ok(()),
                Next::Wait => {
                    drop(self.changed.wait_timeout(share, TICK));
                }
                Next::Piece(rows) => {
                    drop(share);
                    self.piece(&mut hand, rows, false)?;
                }
                Next::Revisit(rows) => {
                    let anyway = share.is_impatient();
                    drop(share);
                    std::thread::sleep(REVISIT);
                    self.piece(&mut hand, rows, anyway)?;
                }
            }
        }
    }

    /// Brings a piece of distinct rows to its end: found, computed, or left to another process.
    fn piece<F, M>(&self, hand: &mut Hand<'_, F, M>, rows: Vec<u32>, anyway: bool) -> Result<(), StageError>
    where
        F: RowFunction,
        M: Fn(RowDevice) -> Result<F, StageError>,
    {
        let mut left = rows;
        let outcome = self.claim(&mut left, anyway).and_then(|()| self.compute(hand, &mut left));
        if outcome.is_err() {
            // The error that is under way matters more than a claim that ends with the process anyway.
            let _ = self.memo().release(&self.job.namespace, &self.keys(&left));
            self.lock().give_back(&left);
            self.changed.notify_all();
        }
        outcome
    }

    fn keys(&self, rows: &[u32]) -> Vec<RowKey> {
        rows.iter().map(|&row| self.job.keys[self.first[row as usize]]).collect()
    }

    /// Takes out of `rows` what another process computes (unless `anyway`) and what is there already.
    fn claim(&self, rows: &mut Vec<u32>, anyway: bool) -> Result<(), StageError> {
        let namespace = &self.job.namespace;
        let mut memo = self.memo();
        let granted = memo.claim(namespace, &self.keys(rows))?;
        let (mut mine, mut others) = (Vec::with_capacity(rows.len()), Vec::new());
        for (&row, granted) in rows.iter().zip(granted) {
            if granted || anyway { mine.push(row) } else { others.push(row) }
        }
        let keys = self.keys(&mine);
        let found = memo.look_up(namespace, &keys)?;
        let there: Vec<RowKey> = keys.iter().zip(&found).filter(|(_, f)| f.is_some()).map(|(k, _)| *k).collect();
        memo.release(namespace, &there)?;
        drop(memo);
        let mut share = self.lock();
        others.into_iter().for_each(|row| share.defer(row));
        rows.clear();
        for (row, found) in mine.into_iter().zip(found) {
            match found {
                Some(bytes) => share.found(row, bytes),
                None => rows.push(row),
            }
        }
        self.changed.notify_all();
        Ok(())
    }

    /// The results of some of `asked`, by distinct rows.
    fn distinct(
        &self,
        asked: &[u32],
        results: Vec<(usize, RowResult)>,
    ) -> Result<(Vec<u32>, Vec<RowResult>), StageError> {
        let numbers: HashMap<usize, u32> = asked.iter().map(|&row| (self.first[row as usize], row)).collect();
        let of = |row| numbers.get(&row).copied();
        let done: Option<Vec<u32>> = results.iter().map(|(row, _)| of(*row)).collect();
        let done = done.filter(|done| !done.is_empty() && done.iter().collect::<HashSet<_>>().len() == done.len());
        let results = results.into_iter().map(|(_, result)| result).collect();
        done.map(|done| (done, results))
            .ok_or_else(|| StageError::bug("a row function returned something else than results of its rows"))
    }

    /// Computes `left`, which on failure holds what was not computed.
    fn compute<F, M>(&self, hand: &mut Hand<'_, F, M>, left: &mut Vec<u32>) -> Result<(), StageError>
    where
        F: RowFunction,
        M: Fn(RowDevice) -> Result<F, StageError>,
    {
        let mut freed_for_one = false;
        let piece = Instant::now();
        while !left.is_empty() {
            let take = hand.limit.min(left.len());
            let rows: Vec<usize> = left[..take].iter().map(|&row| self.first[row as usize]).collect();
            let function = hand.function()?;
            let began = Instant::now();
            let results = match function.compute(&rows) {
                Ok(results) => results,
                Err(StageError::OutOfMemory { .. }) if take > 1 || !freed_for_one => {
                    function.free_memory();
                    freed_for_one = take == 1;
                    hand.limit = (take / 2).max(1);
                    tracing::info!(device = hand.device.number, rows = hand.limit, "out of memory: smaller pieces");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let time = began.elapsed();
            let (done, results) = self.distinct(&left[..take], results)?;
            let keys = self.keys(&done);
            {
                let mut memo = self.memo();
                memo.append(&self.job.namespace, &keys.iter().copied().zip(&results).collect::<Vec<_>>())?;
                memo.release(&self.job.namespace, &keys)?;
            }
            // What was computed is kept; whether it was enough is not to be judged by what a stop cut off.
            if hand.device.stop.is_set() {
                return Err(StageError::Stopped);
            }
            if let Some(end) = hand.function()?.end() {
                return Err(end);
            }
            let gone: HashSet<u32> = done.iter().copied().collect();
            left.retain(|row| !gone.contains(row));
            let mut share = self.lock();
            share.worked(time, piece.elapsed());
            done.into_iter().zip(results).for_each(|(row, result)| share.computed(row, result));
            drop(share);
            self.changed.notify_all();
        }
        Ok(())
    }
}

/// One device's function, made when the first row has to be computed, and how many rows it gets at a time.
struct Hand<'a, F, M> {
    device: &'a RowDevice,
    make: &'a M,
    function: Option<F>,
    limit: usize,
}

impl<F, M: Fn(RowDevice) -> Result<F, StageError>> Hand<'_, F, M> {
    fn function(&mut self) -> Result<&mut F, StageError> {
        match &mut self.function {
            Some(function) => Ok(function),
            empty => Ok(empty.insert((self.make)(self.device.clone())?)),
        }
    }
}

/// Whether few enough rows failed.
fn judge(cx: &mut StageContext, job: &RowJob, rows: Rows) -> Result<Rows, StageError> {
    let failed = rows.failures().count();
    if failed == 0 {
        return Ok(rows);
    }
    let reasons = reasons(&rows);
    let mut text = format!("{failed} of {} {}s failed", rows.len(), job.unit);
    match lines(job, &reasons).as_slice() {
        [one] => text.push_str(&format!("; {one}")),
        several => several.iter().for_each(|line| text.push_str(&format!("\n  {line}"))),
    }
    if failed <= job.max_failed_rows {
        cx.warn(text);
        return Ok(rows);
    }
    let help = match job.max_failed_rows {
        _ if failed == rows.len() && failed > 1 && reasons.len() == 1 => {
            let unit = &job.unit;
            format!("every {unit} failed for the same reason, so it is not the {unit}s' fault: mend that and run again")
        }
        0 => "the others' results are kept: run again to try these alone, or set `max_failed_rows`".to_owned(),
        most => format!("`max_failed_rows` is {most}; the others' results are kept, and a rerun tries these alone"),
    };
    Err(StageError::FailedRows { message: text, help: Some(help) })
}

/// The rows that failed for one and the same reason.
type Alike<'a> = Vec<(usize, &'a RowFailure)>;

/// Failed rows by their reasons: those that most rows have first, equally many in the order of rows.
fn reasons(rows: &Rows) -> Vec<Alike<'_>> {
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut reasons: Vec<Alike> = Vec::new();
    for (row, failure) in rows.failures() {
        let place = *places.entry(&failure.message).or_insert_with(|| {
            reasons.push(Vec::new());
            reasons.len() - 1
        });
        reasons[place].push((row, failure));
    }
    reasons.sort_by_key(|alike| std::cmp::Reverse(alike.len()));
    reasons
}

/// A line for each reason; where there are more than fit, the last one counts the rest.
fn lines(job: &RowJob, reasons: &[Alike]) -> Vec<String> {
    let told = if reasons.len() > LINES { LINES - 1 } else { reasons.len() };
    let line = |alike: &Alike| format!("{}: {}", job.named(alike), alike[0].1.message);
    let mut lines: Vec<String> = reasons[..told].iter().map(line).collect();
    let rest = &reasons[told..];
    if !rest.is_empty() {
        let rows: usize = rest.iter().map(Vec::len).sum();
        lines.push(format!("and {rows} {}s for {} other reasons", job.unit, rest.len()));
    }
    lines
}
