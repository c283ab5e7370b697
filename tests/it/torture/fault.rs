//! The kinds of faults.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use grlm_cache::steps::Step;

use super::{
    Dice, power,
    world::{Blame, STAGES, World},
};

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
const OF_RUNS: usize = 13;

impl Fault {
    pub fn choose(round: usize, dice: &mut Dice) -> Self {
        let step = Step::ALL[dice.roll(OF_RUNS)];
        let visit = 1 + dice.roll(6);
        match round % 9 {
            0 => Fault::KillAt(step, visit),
            1 => Fault::KillAfter(dice.roll(1500)),
            2 => Fault::KillWorker(dice.roll(900)),
            3 => Fault::Fail(step, visit, if dice.roll(2) == 0 { "eio" } else { "enospc" }),
            4 => Fault::PowerCut(step, visit),
            5 => Fault::Flip,
            6 => Fault::Several(2 + dice.roll(7)),
            7 => Fault::SeveralAndKill(2 + dice.roll(7), step, visit),
            _ => Fault::Collect(Step::ALL[OF_RUNS + dice.roll(Step::ALL.len() - OF_RUNS)], visit),
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

    pub fn strike(&self, world: &mut World, dice: &mut Dice) -> Blame {
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
                let mut child = command.spawn().expect("grlm starts");
                thread::sleep(Duration::from_millis(*milliseconds as u64));
                let _ = child.kill();
                let _ = child.wait();
                Blame::NothingLost
            }
            Fault::KillWorker(milliseconds) => {
                let mut command = world.run();
                quiet(&mut command);
                let mut child = command.spawn().expect("grlm starts");
                thread::sleep(Duration::from_millis(*milliseconds as u64));
                if let Some(pid) = dice.pick(&world.processes()) {
                    let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
                }
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
                while !world.processes().is_empty() {
                    thread::sleep(Duration::from_millis(5));
                }
                power::cut(&world.store(), &before, &fs::read_to_string(&log).unwrap_or_default(), dice);
                world.boot += 1;
                Blame::MayBeLost
            }
            Fault::Flip => {
                world.run().status().expect("grlm starts");
                power::flip(&world.store(), dice);
                Blame::MayBeLost
            }
            Fault::Several(count) => {
                world.began();
                let mut children: Vec<_> = (0..*count).map(|_| world.run().spawn().expect("grlm starts")).collect();
                let ended: Vec<bool> = children.iter_mut().map(|c| c.wait().is_ok_and(|s| s.success())).collect();
                assert!(ended.iter().all(|ok| *ok), "{self:?}: {ended:?}");
                let began = world.began();
                let mut stages: Vec<String> = STAGES.map(str::to_owned).to_vec();
                stages.sort();
                let once = began.windows(2).all(|pair| pair[0] != pair[1]);
                // Of an old content that came back, some may be up to date.
                assert!(once && (began == stages || !world.fresh), "{self:?}: stages ran {began:?}");
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
                        command.spawn().expect("grlm starts")
                    })
                    .collect();
                let ended: Vec<bool> = children.iter_mut().map(|c| c.wait().is_ok_and(|s| s.success())).collect();
                assert!(ended.iter().skip(1).all(|ok| *ok), "{self:?}: {ended:?}");
                Blame::NothingLost
            }
            Fault::Collect(step, visit) => {
                let mut run = world.run().spawn().expect("grlm starts");
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
