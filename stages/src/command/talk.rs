//! A program at work: it is given lines and listened to, and its silence is noticed.

use std::{
    io::{self, BufRead, BufReader, Write},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use crate::StopFlag;

/// Between two looks at the stop flag.
const TICK: Duration = Duration::from_millis(50);
/// Lines that came are handed on after so long, though more are expected.
const GATHER: Duration = Duration::from_secs(1);

/// A running program. Its input is written and its output is read by threads of their own, so that neither can block
/// the other.
pub(super) struct Talk {
    child: Child,
    /// Lines for the program; dropped when it gets no more.
    to: Option<Sender<String>>,
    /// Lines from the program, with their ends; closed at the end of its output.
    from: Receiver<Vec<u8>>,
    /// The last line, if it has no end: whether it is whole, how the program ended will tell.
    cut: Option<Vec<u8>>,
}

/// What [`Talk::hear`] heard.
pub(super) struct Heard {
    /// Lines with their ends; the last line of all may lack it, and comes with `ended`.
    pub lines: Vec<Vec<u8>>,
    /// The program's output has ended, and all that was before it was heard.
    pub ended: bool,
}

impl Talk {
    /// Starts the program.
    ///
    /// # Errors
    /// It, or a thread, cannot be started.
    pub fn start(mut command: Command) -> io::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let (to, lines) = mpsc::channel::<String>();
        let (heard, from) = mpsc::channel();
        thread::Builder::new().name("to the program".into()).spawn(move || {
            for text in lines {
                // A program may end without reading everything.
                if stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).is_err() {
                    break;
                }
            }
        })?;
        thread::Builder::new().name("from the program".into()).spawn(move || {
            let mut stdout = BufReader::new(stdout);
            loop {
                let mut line = Vec::new();
                match stdout.read_until(b'\n', &mut line) {
                    Ok(1..) if heard.send(line).is_ok() => {}
                    // A pipe that cannot be read is of no more use than one that has ended.
                    _ => break,
                }
            }
        })?;
        Ok(Self { child, to: Some(to), from, cut: None })
    }

    /// Gives the program lines to read.
    pub fn give(&self, lines: String) {
        // A program that has ended is noticed by the end of its output.
        let _ = self.to.as_ref().map(|to| to.send(lines));
    }

    /// Ends the program's input.
    pub fn close(&mut self) {
        self.to = None;
    }

    /// Waits for the program's next lines: until there are `wanted`, its output ends, or some came and others keep it
    /// waiting; or until the flag is set. `silent` is told how long nothing was heard: after `patience`, then each time
    /// that has doubled.
    pub fn hear(
        &mut self,
        wanted: usize,
        stop: &StopFlag,
        patience: Duration,
        mut silent: impl FnMut(Duration),
    ) -> Heard {
        let mut heard = Heard { lines: Vec::new(), ended: false };
        let began = Instant::now();
        let mut first = None;
        let mut next = patience;
        while heard.lines.len() < wanted && first.is_none_or(|at: Instant| at.elapsed() < GATHER) {
            match self.from.recv_timeout(TICK.min(next)) {
                Ok(line) if line.ends_with(b"\n") => {
                    heard.lines.push(line);
                    first.get_or_insert_with(Instant::now);
                }
                Ok(line) => self.cut = Some(line),
                // What came before is handed on first: the program may live on without its output.
                Err(RecvTimeoutError::Disconnected) => {
                    heard.ended = heard.lines.is_empty();
                    if heard.ended {
                        heard.lines.extend(self.cut.take());
                    }
                    break;
                }
                Err(RecvTimeoutError::Timeout) if stop.is_set() => break,
                Err(RecvTimeoutError::Timeout) if first.is_none() && began.elapsed() >= next => {
                    silent(began.elapsed());
                    next *= 2;
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        heard
    }

    /// Waits for the end of the program, whose input ends; once the flag is set it is killed.
    ///
    /// # Errors
    /// As for [`Child::try_wait`].
    pub fn end(mut self, stop: &StopFlag) -> io::Result<ExitStatus> {
        self.close();
        let mut pause = Duration::from_micros(200);
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if stop.is_set() {
                self.child.kill()?;
            }
            thread::sleep(pause);
            pause = TICK.min(pause * 2);
        }
    }

    /// Ends the shell, whatever it does. What it started sees the end of its input, and goes with the worker.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn sh(text: &str) -> Talk {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        Talk::start(command).unwrap()
    }

    fn lines(heard: &Heard) -> Vec<&str> {
        heard.lines.iter().map(|line| std::str::from_utf8(line).unwrap()).collect()
    }

    #[test]
    fn silence_is_told_again_when_it_has_doubled_and_not_once_something_was_heard() {
        let stop = StopFlag::default();
        let mut talk = sh("read line; echo one; read line");
        let to = talk.to.clone().unwrap();
        let mut told = Vec::new();
        let heard = talk.hear(1, &stop, Duration::from_millis(1), |time| {
            told.push(time);
            if told.len() == 3 {
                to.send("go\n".into()).unwrap();
            }
        });
        assert_eq!((lines(&heard), heard.ended), (vec!["one\n"], false));
        assert!(told.len() >= 3 && told.windows(2).all(|pair| pair[1] > pair[0]), "{told:?}");
        assert!(told[2] >= Duration::from_millis(4), "{told:?}");

        let mut talk = sh("echo one; read line");
        let first = talk.from.recv().unwrap();
        let (heard_before, from) = mpsc::channel();
        heard_before.send(first).unwrap();
        talk.from = from;
        // The first line is there before it is listened for, and the second never comes.
        let mut told = 0;
        let heard = talk.hear(2, &stop, Duration::from_millis(1), |_| told += 1);
        assert_eq!((lines(&heard), told), (vec!["one\n"], 0));
        talk.kill();
    }

    #[test]
    fn what_came_is_handed_on_though_the_program_goes_on() {
        let stop = StopFlag::default();
        let mut talk = sh("echo one; read line; printf two");
        let heard = talk.hear(2, &stop, LONG, |_| ());
        assert_eq!((lines(&heard), heard.ended), (vec!["one\n"], false));
        assert!(talk.end(&stop).is_ok());
        // It closes its output, and lives on.
        let mut talk = sh("echo one; exec >&-; read line");
        let heard = talk.hear(2, &stop, LONG, |_| ());
        assert_eq!((lines(&heard), heard.ended), (vec!["one\n"], false));
        assert!(talk.hear(2, &stop, LONG, |_| ()).ended);
        stop.stop();
        assert!(talk.end(&stop).is_ok());
    }

    #[test]
    fn a_line_without_an_end_comes_with_the_end() {
        let mut talk = sh("echo one; printf two");
        let heard = talk.hear(1, &StopFlag::default(), LONG, |_| ());
        assert_eq!((lines(&heard), heard.ended), (vec!["one\n"], false));
        let heard = talk.hear(1, &StopFlag::default(), LONG, |_| ());
        assert_eq!((lines(&heard), heard.ended), (vec!["two"], true));
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let mut talk = sh("read line");
        let stop = StopFlag::default();
        stop.stop();
        let heard = talk.hear(1, &stop, LONG, |_| ());
        assert_eq!((heard.lines.len(), heard.ended), (0, false));
        talk.kill();
    }
}
