//! The store that is tortured, the pipeline on it, and what must hold after every fault.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::PathBuf,
    process::Command,
};

use crate::environment::{Environment, Outcome, wait_until};

/// Short stages: a chain, a fan, a folder, a file large enough to be synced at once, a stage that runs for long enough to
/// be synced at once, a stage that works row by row on two devices. Some have a child that would outlive a careless run.
/// Each says when it begins, the last one when it is given a row.
const PIPELINE: &str = r#"
name: torture
vars: { salt: none }
stages:
  words:
    uses: command
    with: { run: "echo ${vars.salt} words >> journal; sleep 9871 & seq 1 40 | sed s/^/${vars.salt}-/ > ${outputs.out}" }
    outputs: { out: words.txt }
  upper:
    uses: command
    inputs: { words: words }
    with: { run: "echo ${vars.salt} upper >> journal; (sleep 9872 &) ; sleep 0.55; tr a-z A-Z < ${inputs.words} > ${outputs.out}" }
    outputs: { out: upper.txt }
  count:
    uses: command
    inputs: { words: words }
    with: { run: "echo ${vars.salt} count >> journal; wc -l < ${inputs.words} > ${outputs.out}" }
    outputs: { out: count.txt }
  large:
    uses: command
    with: { run: "echo ${vars.salt} large >> journal; yes ${vars.salt} | head -c 1200000 > ${outputs.out}" }
    outputs: { out: large.txt }
  folder:
    uses: command
    inputs: { words: words }
    with: { run: "echo ${vars.salt} folder >> journal; mkdir -p ${outputs.out}/sub; for i in 1 2 3; do sed -n \"$i p\" ${inputs.words} > ${outputs.out}/sub/$i.txt; done; cp ${inputs.words} ${outputs.out}/copy.txt" }
    outputs: { out: parts }
  join:
    uses: command
    inputs: { upper: upper, count: count, large: large, folder: folder }
    with: { run: "echo ${vars.salt} join >> journal; cat ${inputs.upper} ${inputs.count} ${inputs.folder}/sub/*.txt > ${outputs.out}; wc -c < ${inputs.large} >> ${outputs.out}" }
    outputs: { out: join.txt }
  shout:
    uses: command
    inputs: { rows: { file: rows.jsonl } }
    pass_env: [GRLM_FAULT, GRLM_FAULT_STRUCK, GRLM_FAULT_SYNCED]
    with:
      run: |
        while IFS= read -r line; do
          echo "${vars.salt} $$ $line" >> given
          sleep 0.01
          echo "$line" | sed 's/"row"/"${vars.salt}"/'
        done
      rows: { pass: stream, batch: 2 }
    resources: { gpus: all }
    outputs: { out: shout.jsonl }
"#;

/// Rows of `shout`, and how many its program gets at a time.
pub const ROWS: usize = 12;
const BATCH: usize = 2;

/// Of the stages that run at once; `shout` is counted by rows.
pub const STAGES: [&str; 6] = ["words", "upper", "count", "large", "folder", "join"];

/// What the faults left behind is no fault of the stages that must run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// Whatever was published is there: a stage that is up to date must not run again.
    NothingLost,
    /// Results may have gone (a power cut, flipped bits, a collection).
    MayBeLost,
}

pub struct World {
    pub env: Environment,
    pub salt: String,
    /// Nothing of the present content can be there yet.
    pub fresh: bool,
    /// Which boot the processes believe to run in; a power cut makes a new one.
    pub boot: u32,
    /// A bit flipped in the rows: one of them may have to be computed again.
    pub row_damaged: bool,
}

impl World {
    pub fn new() -> Self {
        let env = Environment::new();
        env.write("torture.yaml", PIPELINE);
        let rows: String = (0..ROWS).map(|n| format!("{{\"id\":{n},\"text\":\"row\"}}\n")).collect();
        env.write("rows.jsonl", &rows);
        Self { env, salt: String::new(), fresh: true, boot: 0, row_damaged: false }
    }

    /// New content, so that everything has to run; now and then an old one comes back.
    pub fn turn(&mut self, round: u64) {
        self.fresh = round % 7 != 6;
        self.salt = format!("s{}", if self.fresh { round } else { round - 2 });
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.env.command(arguments);
        command.env("GRLM_FAULT_BOOT", format!("boot {}", self.boot)).env("GRLM_FAULT_FRESH", "1");
        command.env("GRLM_FAULT_STRUCK", self.env.path("struck"));
        command
    }

    /// `grlm run` of the present content, not yet started.
    pub fn run(&self) -> Command {
        let salt = format!("vars.salt={}", self.salt);
        self.command(&["run", "torture.yaml", "--set", &salt, "--devices", "sim:2", "--quiet"])
    }

    pub fn store(&self) -> PathBuf {
        self.env.path(".grlm")
    }

    fn grlm(&self, arguments: &[&str]) -> Outcome {
        Outcome::from(self.command(arguments).output().expect("grlm starts"))
    }

    /// How often each stage of the present content began since the last call.
    pub fn began(&self) -> Vec<String> {
        let mine = format!("{} ", self.salt);
        let ran = self.env.ran();
        ran.into_iter().filter_map(|line| line.strip_prefix(&mine).map(str::to_owned)).collect()
    }

    /// Whether a fault that was asked for at a step struck since the last call.
    pub fn struck(&self) -> bool {
        fs::remove_file(self.env.path("struck")).is_ok()
    }

    /// Rows of the present content that programs were given so far in this round, in order: program and row.
    pub fn given(&self) -> Vec<(String, String)> {
        let mine = format!("{} ", self.salt);
        let text = fs::read_to_string(self.env.path("given")).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.strip_prefix(&mine)?.split_once(' '));
        lines.map(|(program, row)| (program.to_owned(), row.to_owned())).collect()
    }

    /// Rows that were finished and computed again. A program gets its next rows only when its last ones are kept, so
    /// once it was given a batch more, a row is finished.
    fn finished_twice(given: &[(String, String)]) -> Vec<&str> {
        let mut twice = Vec::new();
        for (place, (program, row)) in given.iter().enumerate() {
            let later = given.iter().enumerate().skip(place + 1);
            let finished = later.clone().filter(|(_, (other, _))| other == program).nth(BATCH - 1);
            let Some((finished, _)) = finished else { continue };
            if later.skip_while(|(at, _)| *at <= finished).any(|(_, (_, other))| other == row) {
                twice.push(row.as_str());
            }
        }
        twice
    }

    /// No process is left, what is up to date stays so, a plain run succeeds, its results are right, no lock is held.
    pub fn check(&mut self, told: &str, blame: Blame) {
        self.wait_for_orphans(told);
        let set = format!("vars.salt={}", self.salt);
        let plan = self.grlm(&["plan", "torture.yaml", "--set", &set, "--json"]);
        assert_eq!(plan.code, 0, "{told}: plan: {}", plan.stderr);
        let plan: Vec<serde_json::Value> = serde_json::from_str(&plan.stdout).unwrap_or_default();
        let cached: BTreeSet<String> = plan
            .iter()
            .filter(|stage| stage["action"] == "cached")
            .filter_map(|stage| Some(stage["stage"].as_str()?.to_owned()))
            .collect();
        self.began();
        let rows_before = self.given().len();
        let outcome = Outcome::from(self.run().output().expect("grlm starts"));
        assert_eq!(outcome.code, 0, "{told}: the next plain run failed: {}", outcome.stderr);
        let mut again: BTreeSet<String> = self.began().into_iter().collect();
        let given = self.given();
        if given.len() > rows_before {
            again.insert("shout".to_owned());
        }
        let twice: Vec<&String> = again.intersection(&cached).collect();
        assert!(twice.is_empty(), "{told}: {twice:?} were up to date and ran again");
        if blame == Blame::NothingLost {
            let rows = Self::finished_twice(&given);
            assert!(rows.is_empty(), "{told}: finished rows were computed again: {rows:?}");
            let sound = self.grlm(&["run", "torture.yaml", "--set", &set, "--quiet"]);
            assert!(sound.code == 0 && self.began().is_empty(), "{told}: not everything is up to date after a run");
        }
        self.check_results(told);
        // Once more from the rows alone: all are there, and right.
        let forced = Outcome::from(self.run().args(["--force", "shout"]).output().expect("grlm starts"));
        assert_eq!(forced.code, 0, "{told}: a forced run failed: {}", forced.stderr);
        let again = self.given().len() - given.len();
        assert!(again <= usize::from(self.row_damaged), "{told}: {again} rows that are kept were computed again");
        let _ = fs::remove_file(self.env.path("given"));
        self.row_damaged = false;
        self.check_results(told);
        self.wait_for_orphans(told);
        for entry in fs::read_dir(self.store().join("locks")).into_iter().flatten().flatten() {
            let free = File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
            assert!(free, "{told}: lock {} is held", entry.path().display());
        }
    }

    /// Every file under `out/` is what the content makes it, to the byte.
    fn check_results(&self, told: &str) {
        let words: String = (1..=40).map(|i| format!("{}-{i}\n", self.salt)).collect();
        let line = |n: usize| format!("{}-{n}\n", self.salt);
        let large = format!("{}\n", self.salt).repeat(1_200_000 / (self.salt.len() + 1) + 1);
        let upper = words.to_uppercase();
        let wanted = [
            ("words/words.txt", words.clone()),
            ("upper/upper.txt", upper.clone()),
            ("count/count.txt", "40\n".to_owned()),
            ("large/large.txt", large[..1_200_000].to_owned()),
            ("folder/parts/sub/2.txt", line(2)),
            ("folder/parts/copy.txt", words),
            ("shout/shout.jsonl", (0..ROWS).map(|n| format!("{{\"id\":{n},\"text\":\"{}\"}}\n", self.salt)).collect()),
            ("join/join.txt", format!("{upper}40\n{}{}{}1200000\n", line(1), line(2), line(3))),
        ];
        for (path, text) in wanted {
            let found = fs::read_to_string(self.env.path("out/torture").join(path)).unwrap_or_default();
            assert!(found == text, "{told}: {path} is wrong: {} bytes, wanted {}", found.len(), text.len());
        }
    }

    /// The whole store can be believed: what is not was moved aside, and once more nothing is wrong.
    pub fn check_all(&self, told: &str) {
        let first = self.grlm(&["verify"]);
        assert!(matches!(first.code, 0 | 6), "{told}: verify: {}", first.stderr);
        let collected = self.grlm(&["gc", "--max-age", "1000d"]);
        assert_eq!(collected.code, 0, "{told}: gc: {}", collected.stderr);
        let second = self.grlm(&["verify", "--json"]);
        let found: serde_json::Value = serde_json::from_str(&second.stdout).unwrap_or_default();
        let damaged =
            found["findings"].as_array().map_or(0, |all| all.iter().filter(|f| f["kind"] != "missing").count());
        assert_eq!(damaged, 0, "{told}: {}", second.stdout);
    }

    /// Workers of this world, and what they started.
    pub fn processes(&self) -> Vec<u32> {
        let Ok(root) = fs::canonicalize(self.env.path(".")) else { return Vec::new() };
        let here = |pid: &u32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command);
            (command.contains("__worker") || command.contains("sleep"))
                && fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == root)
        };
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(here).collect()
    }

    pub fn wait_for_orphans(&self, told: &str) {
        wait_until(&format!("{told}: no process outlives its run"), || self.processes().is_empty());
    }
}
