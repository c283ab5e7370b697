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
    from: Receiver<String>,
}

/// What [`Talk::hear`] heard.
pub(super) struct Heard {
    /// Lines with their ends, which only the last line of all may lack.
    pub lines: Vec<String>,
    /// The program's output has ended.
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
                let read = stdout.read_until(b'\n', &mut line);
                let end = read.unwrap_or(0) == 0;
                if end || heard.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { child, to: Some(to), from })
    }

    /// Gives the program lines to read.
    pub fn give(&self, lines: String) {
        // A program that has ended is noticed by its silence.
        let _ = self.to.as_ref().map(|to| to.send(lines));
    }

    /// Ends the program's input.
    pub fn close(&mut self) {
        self.to = None;
    }

    /// Waits for the program's next lines: until there are `wanted`, its output ends, or some came and others keep it
    /// waiting; or until the flag is set. `silent` is told how long nothing was heard: after `patience`, then each time
    /// that has doubled.
    pub fn hear(&self, wanted: usize, stop: &StopFlag, patience: Duration, mut silent: impl FnMut(Duration)) -> Heard {
        let mut heard = Heard { lines: Vec::new(), ended: false };
        let began = Instant::now();
        let mut first = None;
        let mut next = patience;
        while heard.lines.len() < wanted && first.is_none_or(|at: Instant| at.elapsed() < GATHER) {
            match self.from.recv_timeout(TICK.min(next)) {
                Ok(line) => {
                    heard.lines.push(line);
                    first.get_or_insert_with(Instant::now);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    heard.ended = true;
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

    /// Waits for the end of the program, whose input ends.
    ///
    /// # Errors
    /// As for [`Child::wait`].
    pub fn end(mut self) -> io::Result<ExitStatus> {
        self.close();
        self.child.wait()
    }

    /// Ends the program, whatever it does.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(text: &str) -> Talk {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        Talk::start(command).unwrap()
    }

    #[test]
    fn silence_is_told_while_it_lasts_and_not_once_something_was_heard() {
        let talk = sh("read line; echo one; read line; echo two");
        let told = std::cell::RefCell::new(Vec::new());
        let stop = StopFlag::default();
        let hear = |wanted| {
            talk.hear(wanted, &stop, Duration::from_millis(1), |time| {
                told.borrow_mut().push(time);
                // Only now does the program get what it waits for.
                talk.give("go\n".into());
            })
        };
        let heard = hear(1);
        assert_eq!((heard.lines, heard.ended), (vec!["one\n".to_owned()], false));
        assert!(!told.borrow().is_empty());
        let heard = hear(5);
        assert_eq!((heard.lines, heard.ended), (vec!["two\n".to_owned()], true));
        let told = told.into_inner();
        assert!(told[0] >= Duration::from_millis(1), "{told:?}");
    }

    #[test]
    fn what_came_is_handed_on_though_the_program_goes_on() {
        let talk = sh("echo one; read line; printf two");
        let heard = talk.hear(2, &StopFlag::default(), Duration::from_secs(3600), |_| ());
        assert_eq!((heard.lines, heard.ended), (vec!["one\n".to_owned()], false));
        assert!(talk.end().is_ok());
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let talk = sh("read line");
        let stop = StopFlag::default();
        stop.stop();
        let heard = talk.hear(1, &stop, Duration::from_secs(3600), |_| ());
        assert_eq!((heard.lines.len(), heard.ended), (0, false));
        talk.kill();
    }
}
