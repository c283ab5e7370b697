//! The kinds of faults.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use grlm_cache::steps::Step;

use super::{
    Dice, power,
    world::{Blame, ROWS, STAGES, World},
};
use crate::environment::Running;

#[derive(Debug, Clone)]
pub enum Fault {
    /// The orchestrator dies at the named step.
    KillAt(Step, usize),
    /// It dies so many milliseconds after its start.
    KillAfter(usize),
    /// A worker, or something that it started, dies.
    KillWorker(usize),
    /// The step fails.
    Fail(Step, usize, &'static str),
    /// It dies at the step, and what was not synced is lost.
    PowerCut(Step, usize),
    /// A bit of the store flips after a run.
    Flip,
    /// Several run at once, none of them harmed.
    Several(usize),
    /// Several run at once, and one of them dies at the step.
    SeveralAndKill(usize, Step, usize),
    /// A collection of everything runs beside, and dies at the step.
    Collect(Step, usize),
}

/// Steps of a run; those of a collection come after.
const OF_RUNS: usize = 15;

/// How often a step is reached, about: a fault at a later visit would not strike.
fn visits(step: Step) -> usize {
    match step {
        Step::RowsSynced | Step::BlobSynced | Step::RecordSynced | Step::TrashEmptied => 1,
        Step::FolderFilesPlaced | Step::ManifestStaged | Step::FolderPlaced => 1,
        _ => 6,
    }
}

impl Fault {
    pub fn choose(round: usize, dice: &mut Dice) -> Self {
        let step = Step::ALL[dice.roll(OF_RUNS)];
        let visit = 1 + dice.roll(visits(step));
        match round % 9 {
            0 => Fault::KillAt(step, visit),
            1 => Fault::KillAfter(dice.roll(900)),
            2 => Fault::KillWorker(dice.roll(700)),
            3 => Fault::Fail(step, visit, if dice.roll(2) == 0 { "eio" } else { "enospc" }),
            4 => Fault::PowerCut(step, visit),
            5 => Fault::Flip,
            6 => Fault::Several(2 + dice.roll(7)),
            7 => Fault::SeveralAndKill(2 + dice.roll(7), step, visit),
            _ => {
                let step = Step::ALL[OF_RUNS + dice.roll(Step::ALL.len() - OF_RUNS)];
                Fault::Collect(step, 1 + dice.roll(visits(step)))
            }
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Fault::KillAt(..) => "kill at a step",
            Fault::KillAfter(_) => "kill at random",
            Fault::KillWorker(_) => "kill a worker",
            Fault::Fail(_, _, "eio") => "I/O error",
            Fault::Fail(..) => "full disk",
            Fault::PowerCut(..) => "power cut",
            Fault::Flip => "flipped bit",
            Fault::Several(_) => "2 to 8 at once",
            Fault::SeveralAndKill(..) => "2 to 8 at once, one killed",
            Fault::Collect(..) => "collection killed beside a run",
        }
    }

    /// Does it; tells what may be lost, and whether it struck: a process may be at its end before it comes to a step.
    pub fn strike(&self, world: &mut World, dice: &mut Dice) -> (Blame, bool) {
        world.struck();
        let mut struck = None;
        let blame = self.strike_or(world, dice, &mut struck);
        (blame, struck.unwrap_or_else(|| world.struck()))
    }

    /// `struck` is set where no step says so.
    fn strike_or(&self, world: &mut World, dice: &mut Dice, struck: &mut Option<bool>) -> Blame {
        let quiet = |command: &mut Command| {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        };
        let fault = |step: &Step, visit: &usize, kind: &str| format!("{step:?}:{visit}:{kind}");
        match self {
            Fault::KillAt(step, visit) => {
                let mut command = world.run();
                quiet(command.env("GRLM_FAULT", fault(step, visit, "kill")));
                command.status().expect("grlm starts");
                Blame::NothingLost
            }
            Fault::Fail(step, visit, kind) => {
                let output = world.run().env("GRLM_FAULT", fault(step, visit, kind)).output().expect("grlm starts");
                let said = String::from_utf8_lossy(&output.stderr);
                let polite = output.status.success() || matches!(output.status.code(), Some(1 | 4));
                assert!(polite && !said.contains("panicked"), "{self:?}: {:?} {said}", output.status);
                Blame::NothingLost
            }
            Fault::KillAfter(milliseconds) => {
                let mut command = world.run();
                quiet(&mut command);
                let mut child = Running::start(&mut command);
                thread::sleep(Duration::from_millis(*milliseconds as u64));
                let _ = child.kill();
                *struck = Some(child.wait().is_ok_and(|status| status.signal().is_some()));
                Blame::NothingLost
            }
            Fault::KillWorker(milliseconds) => {
                let mut command = world.run();
                quiet(&mut command);
                let mut child = Running::start(&mut command);
                thread::sleep(Duration::from_millis(*milliseconds as u64));
                // Between two stages there is none.
                let mut there = world.processes();
                while there.is_empty() && child.try_wait().is_ok_and(|ended| ended.is_none()) {
                    thread::sleep(Duration::from_millis(1));
                    there = world.processes();
                }
                let chosen = dice.pick(&there).copied();
                *struck = Some(chosen.is_some_and(|pid| {
                    let killed = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
                    killed.is_ok_and(|status| status.success())
                }));
                let _ = child.wait();
                Blame::NothingLost
            }
            Fault::PowerCut(step, visit) => {
                let log = world.env.path("synced");
                let _ = fs::remove_file(&log);
                let before = power::snapshot(&world.store());
                let mut command = world.run();
                quiet(command.env("GRLM_FAULT", fault(step, visit, "kill")).env("GRLM_FAULT_SYNCED", &log));
                command.status().expect("grlm starts");
                world.wait_for_orphans(&format!("{self:?}"));
                power::cut(&world.store(), &before, &fs::read_to_string(&log).unwrap_or_default(), dice);
                world.boot += 1;
                Blame::MayBeLost
            }
            Fault::Flip => {
                world.run().status().expect("grlm starts");
                let flipped = power::flip(&world.store(), dice);
                *struck = Some(flipped.is_some());
                world.row_damaged = flipped.is_some_and(|path| path.starts_with(world.store().join("rows")));
                Blame::MayBeLost
            }
            Fault::Several(count) => {
                world.began();
                *struck = Some(true);
                let mut children: Vec<_> = (0..*count).map(|_| Running::start(&mut world.run())).collect();
                let ended: Vec<bool> = children.iter_mut().map(|c| c.wait().is_ok_and(|s| s.success())).collect();
                assert!(ended.iter().all(|ok| *ok), "{self:?}: {ended:?}");
                let began = world.began();
                let mut stages: Vec<String> = STAGES.map(str::to_owned).to_vec();
                stages.sort();
                let once = began.windows(2).all(|pair| pair[0] != pair[1]);
                // Of an old content that came back, some may be up to date.
                assert!(once && (began == stages || !world.fresh), "{self:?}: stages ran {began:?}");
                let mut rows: Vec<String> = world.given().into_iter().map(|(_, row)| row).collect();
                let given = rows.len();
                rows.sort();
                rows.dedup();
                assert!(rows.len() == given && (given == ROWS || !world.fresh), "{self:?}: {given} rows were computed");
                Blame::NothingLost
            }
            Fault::SeveralAndKill(count, step, visit) => {
                let mut children: Vec<_> = (0..*count)
                    .map(|i| {
                        let mut command = world.run();
                        quiet(&mut command);
                        if i == 0 {
                            command.env("GRLM_FAULT", fault(step, visit, "kill"));
                        }
                        let child = Running::start(&mut command);
                        // A start ahead, or the others would have done all of it when it comes to its step.
                        thread::sleep(Duration::from_millis(if i == 0 { 50 } else { 0 }));
                        child
                    })
                    .collect();
                let ended: Vec<bool> = children.iter_mut().map(|c| c.wait().is_ok_and(|s| s.success())).collect();
                assert!(ended.iter().skip(1).all(|ok| *ok), "{self:?}: {ended:?}");
                Blame::NothingLost
            }
            Fault::Collect(step, visit) => {
                let mut run = Running::start(&mut world.run());
                thread::sleep(Duration::from_millis(dice.roll(900) as u64));
                let mut collect = world.command(&["gc", "--max-size", "0", "--quiet"]);
                quiet(collect.env("GRLM_FAULT", fault(step, visit, "kill")));
                collect.status().expect("grlm starts");
                assert!(run.wait().is_ok_and(|status| status.success()), "{self:?}: the run beside it failed");
                Blame::MayBeLost
            }
        }
    }
}
